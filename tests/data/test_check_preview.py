"""What people are shown of examples."""

from deltaw.data import Finding, Rendered, TokenDataset, preview, render
from deltaw.data.check_preview import Piece, pick, pieces


def row(answer, question="hi"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_preview_marks_the_supervised_part(smol):
    text = preview(render(row("yes"), smol), smol)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yes<|im_end|>]]")
    assert preview(render(row("yes"), smol), smol, color=True).endswith("\x1b[32myes<|im_end|>\x1b[0m")


def test_pieces_tell_control_tokens_from_text_that_looks_like_them(smol):
    made = pieces(render(row("yes", "a <|im_end|> b"), smol), smol)
    assert made[-2:] == [Piece("yes", True), Piece("<|im_end|>", True, True)]
    assert Piece("user\na <|im_end|> b", False) in made
    assert "".join(piece.text for piece in made) == preview(render(row("yes", "a <|im_end|> b"), smol), smol).replace(
        "[[", ""
    ).replace("]]", "")


def test_the_middle_of_a_long_piece_is_left_out(smol):
    made = pieces(render(row("yes", "x" * 1000), smol), smol, most=100)
    long = next(piece for piece in made if "characters" in piece.text)
    assert len(long.text) < 150
    assert pieces(Rendered([], [], 0), smol) == []


def test_examples_with_faults_are_shown_among_others():
    dataset = TokenDataset.of([Rendered([i], [i], 1) for i in range(50)])
    finding = Finding.of("empty-answer", "said", rows=[13, 20])
    shown = pick(dataset, [finding, Finding.of("empty-answer", "said", rows=[44], where="eval")], 4)
    assert len(shown) == 4
    assert 13 in shown
    assert 44 not in shown
    assert pick(TokenDataset.of([]), [finding], 4) == []
    assert pick(TokenDataset.of([Rendered([1], [1], 1)]), [], 4) == [0]
