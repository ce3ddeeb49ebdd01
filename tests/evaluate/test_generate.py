"""Batched answers are those of one prompt at a time, and nothing is left changed."""

from __future__ import annotations

import copy

import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer

from deltaw.errors import ConfigError, DataError
from deltaw.evaluate import generate_batch, stream_answer
from deltaw.evaluate.generate import as_prompt_ids

PROMPTS = ["a", "a much longer prompt than the first", "mid-sized one", "b" * 40, "c", "x y z"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_batched_equals_one_by_one_in_the_order_of_the_prompts(model, tokenizer):
    seen = []
    batched = generate_batch(
        model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4, progress=lambda *done: seen.append(done)
    )
    alone = [generate_batch(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert batched == alone
    assert len(set(batched)) > 1
    assert seen == [(4, 6), (6, 6)]


def test_it_is_what_plain_greedy_decoding_gives(model, tokenizer):
    ids = as_prompt_ids("abc", tokenizer)
    made: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == tokenizer.eos_token_id:
                break
    text = tokenizer.decode([i for i in made if i != tokenizer.eos_token_id], skip_special_tokens=True)
    assert generate_batch(model, tokenizer, ["abc"], max_new_tokens=8) == [text]


def test_a_conversation_goes_through_the_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    expected = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert as_prompt_ids(messages, tokenizer) == expected
    assert as_prompt_ids({"messages": [*messages, {"role": "assistant", "content": "no"}]}, tokenizer) == expected


def test_the_answer_ends_where_the_turn_ends(tokenizer):
    model = tiny_model()
    stop = tokenizer.eos_token_id

    class Stops(torch.nn.Module):
        """Makes the third token of the answer the end of the turn, whatever the model says."""

        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:2], 258)
            logits[..., 70] = 1.0
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                logits[..., stop] = 2.0
            return logits

    model.lm_head = Stops()
    answer = generate_batch(model, tokenizer, [[{"role": "user", "content": "hi"}]], max_new_tokens=20)[0]
    assert answer == tokenizer.decode([70, 70])
    assert model.lm_head.calls == 3


def test_nothing_is_left_changed(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    before = copy.deepcopy(model.generation_config.to_dict())
    side = tokenizer.padding_side
    generate_batch(model, tokenizer, ["a", "bcd"], max_new_tokens=2)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert model.config.use_cache is False
    assert model.generation_config.to_dict() == before
    assert tokenizer.padding_side == side
    model.eval()


def test_the_models_own_generation_defaults_do_not_creep_in(tokenizer):
    model = tiny_model()
    plain = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=10)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=3, num_beams=1)
    assert generate_batch(model, tokenizer, PROMPTS, max_new_tokens=10) == plain


def test_no_prompts_no_answers(model, tokenizer):
    assert generate_batch(model, tokenizer, []) == []


def test_what_cannot_be_answered(tokenizer):
    model = tiny_model(window=16)
    with pytest.raises(DataError, match=r"1 of 2 prompts leave no room for 4 new tokens .* prompt 1 \(30 tokens\)"):
        generate_batch(model, tokenizer, ["a", "b" * 30], max_new_tokens=4)
    with pytest.raises(DataError, match="empty prompt"):
        generate_batch(model, tokenizer, [""], max_new_tokens=4)
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        generate_batch(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(ConfigError, match="temperature = -1"):
        stream_answer(model, tokenizer, "a", print, temperature=-1)


def test_streamed_pieces_make_the_whole(model, tokenizer):
    pieces: list[str] = []
    answer = stream_answer(model, tokenizer, "say it", pieces.append, max_new_tokens=12)
    assert "".join(pieces) == answer == generate_batch(model, tokenizer, ["say it"], max_new_tokens=12)[0]


def test_a_seed_repeats_a_draw_and_leaves_the_random_state_alone(model, tokenizer):
    def draw(seed):
        return stream_answer(model, tokenizer, "x", len, max_new_tokens=12, temperature=2.0, seed=seed)

    state = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(1) == first
    assert len({draw(seed) for seed in range(4)}) > 1
