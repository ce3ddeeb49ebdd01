"""``deltaw chat``: a conversation in the terminal, streamed, with the chat template of the adapter."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from deltaw.cli.common import Adapter, Dtype, Loaded, Model, load_adapted, say, working
from deltaw.errors import ConfigError, DeltawError

__all__ = ["chat"]

_HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves; "
    "Ctrl-C stops an answer, Ctrl-D leaves"
)


def chat(
    adapter: Adapter = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model: context is kept, answers are streamed, Ctrl-C stops an answer, Ctrl-D leaves."""
    with working():
        loaded = load_adapted(model, adapter, dtype)
    if not loaded.tokenizer.chat_template:
        raise ConfigError(f"{adapter or loaded.name} has no chat template to talk in: use deltaw generate --raw")
    say().print(f"{loaded.name}{' + ' + adapter if adapter else ''}\n{_HELP}", style="dim", markup=False)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    Conversation(loaded, system, settings).run()


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(self, loaded: Loaded, system: str | None, settings: dict[str, Any]) -> None:
        self.loaded, self.settings = loaded, settings
        self.system = system
        self.turns: list[dict[str, str]] = []

    def run(self) -> None:
        """Read, answer, again; until /exit or the end of the input."""
        while True:
            try:
                line = _read()
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt it clears the line, as in a shell
                say().print()
                continue
            if not line.strip():
                continue
            if line.startswith("/"):
                if self.command(line.strip()):
                    return
                continue
            self.answer(line)

    def command(self, line: str) -> bool:
        """Obey a command; True ends the conversation."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return True
        if word == "/reset":
            self.turns.clear()
            say().print("forgotten", style="dim")
        elif word == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
            say().print(
                "a new conversation with " + ("this" if rest.strip() else "no") + " system message",
                style="dim",
            )
        else:
            say().print(_HELP, style="dim", markup=False)
        return False

    def answer(self, line: str) -> None:
        """Stream the answer to ``line``; what was said before Ctrl-C stays in the conversation."""
        from deltaw.evaluate import stream_answer

        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.turns.append({"role": "user", "content": line})
        said: list[str] = []

        def show(text: str) -> None:
            said.append(text)
            print(text, end="", flush=True)

        try:
            answer = stream_answer(
                self.loaded.model, self.loaded.tokenizer, [*head, *self.turns], show, **self.settings
            )
        except KeyboardInterrupt:
            answer = "".join(said).strip()
            say().print(" [stopped]", style="yellow", markup=False, end="")
        except DeltawError as error:  # the conversation outgrew the model: it can be reset, so do not leave
            self.turns.pop()
            say().print(f"error: {error} (/reset begins anew)", style="red", markup=False, soft_wrap=True)
            return
        print(flush=True)
        self.turns.append({"role": "assistant", "content": answer})  # as it was said, white space and all


def _read() -> str:
    """A line from the person, or from a pipe."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and editing
    return input("\n> ")
