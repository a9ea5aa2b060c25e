"""What is documented as not served is refused: plainly, compiled and exported."""

import copy
import pickle
import weakref

import pytest
import torch
from transformers import GenerationConfig

from claa_ops.huggingface.answer import answer_attention
from claa_ops.huggingface.prompt import context_length
from claa_ops.methods import CLAA, FullKV, GemFilter
from claa_ops.prefill import ClaaCache, StaticClaaCache, attach, decode, generate, prefill
from support.tiny_models import build, prompt

METHOD = CLAA(keep=0.5, layer=1, last_n=2)
SHALLOW = CLAA(keep=0.5, layer=0, last_n=1)
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return attach(build("llama"))


@pytest.fixture(scope="module")
def shallow():
    return attach(build("llama", num_hidden_layers=2))


@pytest.fixture
def cache(model):
    return ClaaCache(model.config, METHOD)


def filled(model):
    """A cache after a prompt of 40 tokens in each of two rows, the second padded."""
    ids, mask = prompt(40, 25)
    cache = ClaaCache(model.config, METHOD)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache, mask


# One forward.

IDS, MASK = prompt(40, 25)
HOLE = MASK.clone()
HOLE[:, 30:33] = 0
EMPTY_ROW = MASK.clone()
EMPTY_ROW[1] = 0
COUNT = torch.arange(40)
PADDED = "prompts must be padded on the left and have a token in each row"
ASCEND = "position_ids must ascend over the prompt"
PROMPTS = {
    "right padding": ({"attention_mask": MASK.flip(1)}, PADDED),
    "a hole": ({"attention_mask": HOLE}, PADDED),
    "an empty row": ({"attention_mask": EMPTY_ROW}, PADDED),
    "a short mask": ({"attention_mask": MASK[:, 1:]}, r"must have shape \[2, 40\], got \[2, 39\]"),
    "a mask of one row": (
        {"attention_mask": MASK[:1]},
        r"must have shape \[2, 40\], got \[1, 40\]",
    ),
    "a mask of pairs": (
        {"attention_mask": torch.ones(2, 1, 40, 40)},
        r"must have shape \[2, 40\], got \[2, 1, 40, 40\]",
    ),
    "two sequences in one": ({"position_ids": (COUNT % 20).expand(2, -1)}, ASCEND),
    "descending": ({"position_ids": COUNT.flip(0)[None]}, ASCEND),
    "negative": ({"position_ids": COUNT[None] - 40}, ASCEND),
    "labels": ({"labels": IDS}, "labels must be None"),
    "no cache": ({"use_cache": False}, "use_cache must not be False"),
}


def refused(forward, name):
    """A compiled graph raises RuntimeError: it asserts values that others look at."""
    arguments, message = PROMPTS[name]
    cache = ClaaCache(build("llama", num_hidden_layers=2).config, SHALLOW)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=message):
        forward(IDS, past_key_values=cache, **arguments)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_are_not_served(shallow, name):
    refused(shallow, name)


@pytest.mark.parametrize("name", ["a short mask", "a mask of pairs", "labels", "no cache"])
def test_prompts_that_no_graph_is_made_for(shallow, name):
    torch.compiler.reset()
    refused(torch.compile(shallow, backend="eager", dynamic=True), name)


def test_a_graph_made_for_good_prompts_refuses_bad_ones(shallow):
    """Values decide, and the graph asserts them when it runs."""
    torch.compiler.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(shallow, fullgraph=True, dynamic=True, backend=count)
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    for mask, position_ids, message in (
        (MASK, positions, None),
        (MASK.flip(1), positions, PADDED),
        (HOLE, positions, PADDED),
        (EMPTY_ROW, positions, PADDED),
        (MASK, (COUNT % 20).repeat(2, 1), ASCEND),
        (MASK, COUNT.flip(0).repeat(2, 1), ASCEND),
        (MASK, positions - 40, ASCEND),
        (MASK, positions, None),
    ):
        arguments = {"attention_mask": mask, "position_ids": position_ids}
        arguments["past_key_values"] = ClaaCache(shallow.config, SHALLOW)
        with torch.no_grad():
            if message is None:
                assert compiled(IDS, **arguments).logits.shape[1] == 20
            else:
                with pytest.raises(RuntimeError, match=message):
                    compiled(IDS, **arguments)
    assert len(graphs) == 1


def test_training_is_refused_compiled_too():
    torch.compiler.reset()
    model = attach(build("llama", num_hidden_layers=2)).train()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with pytest.raises(ValueError, match=r"must be in eval mode, call model.eval\(\)"):
        compiled(IDS, past_key_values=ClaaCache(model.config, SHALLOW))


class Prefill(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, position_ids):
        cache = ClaaCache(self.model.config, SHALLOW)
        return self.model(
            ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        ).logits


def test_an_exported_prefill_refuses_what_the_model_does(shallow):
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    wrapper = Prefill(shallow)
    with torch.no_grad():
        program = torch.export.export(wrapper, (IDS, MASK, positions), strict=False).module()
        torch.testing.assert_close(
            program(IDS, MASK, positions), wrapper(IDS, MASK, positions), atol=1e-3, rtol=1e-3
        )
        with pytest.raises(RuntimeError, match=PADDED):
            program(IDS, MASK.flip(1), positions)
        with pytest.raises(RuntimeError, match=ASCEND):
            program(IDS, MASK, positions.flip(1))


def test_masks_and_positions_of_other_kinds_are_served(model):
    def logits(**arguments):
        with torch.no_grad():
            return model(IDS, past_key_values=ClaaCache(model.config, METHOD), **arguments).logits

    expected = logits(attention_mask=MASK)
    for mask in (MASK.bool(), MASK.float(), MASK.int()):
        assert torch.equal(logits(attention_mask=mask), expected)
    positions = COUNT.expand(2, -1)
    assert torch.equal(logits(position_ids=positions), logits())
    assert torch.equal(logits(position_ids=positions[:1]), logits())
    for padding in (0, 1):  # what stands at padding does not matter
        counted = (MASK.cumsum(1) - 1).masked_fill(MASK == 0, padding)
        assert logits(attention_mask=MASK, position_ids=counted).isfinite().all()


def test_turns_that_are_not_served(model):
    turn = prompt(5, 5)[0]
    whole = torch.cat([MASK, torch.ones(2, 5, dtype=MASK.dtype)], dim=1)
    hole = whole.clone()
    hole[:, 30:33] = 0
    for ids, arguments, message in (
        (
            turn,
            {"attention_mask": torch.ones(2, 5)},
            r"must have shape \[2, 45\].*got \[2, 5\].*reset",
        ),
        (turn, {"attention_mask": torch.ones(2, 1, 5, 45)}, r"must have shape \[2, 45\]"),
        *(
            (
                turn[:, :n],
                {"attention_mask": whole[:, : 40 + n], "position_ids": positions[None, :n]},
                "must ascend after the tokens that the cache",
            )
            for positions, n in ((COUNT, 5), (45 - COUNT, 5), (COUNT, 1))
        ),
        *((turn[:, -n:], {}, "attention_mask must be given after a padded") for n in (1, 5)),
        *(
            (turn[:, -n:], {"attention_mask": mask[:, : 40 + n]}, "the padding of the prompt")
            for n in (1, 5)
            for mask in (torch.ones_like(whole), hole, whole.flip(0))
        ),
        (turn, {"attention_mask": {"full_attention": whole}}, "must be a tensor.*got dict"),
        (turn[:1], {}, "the batch must have its 2 rows, got 1"),
        (turn, {"use_cache": False}, "use_cache must not be False"),
    ):
        cache, _ = filled(model)
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
            model(ids, past_key_values=cache, **arguments)
        # What was refused has changed nothing.
        assert cache.get_seq_length() == 40 and not cache.in_forward


def test_a_cache_of_another_attention_is_refused(model):
    """Layers of the same number and shape may still attend otherwise."""
    other, short = attach(build("mistral")), prompt(40)[0]
    for one, config in ((model, other.config), (other, model.config)):
        with torch.no_grad(), pytest.raises(ValueError, match="sliding_attention over 16 tokens"):
            one(short, past_key_values=ClaaCache(config, METHOD))
    cache = ClaaCache(model.config, METHOD)
    with torch.no_grad():
        model(short, past_key_values=cache)
        with pytest.raises(ValueError, match="StaticClaaCache: the cache must be one of this mod"):
            other(short[:, :1], past_key_values=StaticClaaCache(cache, 4))


def test_static_turns_that_are_not_served(model):
    cache, mask = filled(model)
    for ids, mask_of, message in (
        (IDS[:1, :1], None, "the batch must have its 2 rows, got 1"),
        (IDS[:, :1], mask, "attention_mask must have 41 columns.*got 40"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask_of, past_key_values=StaticClaaCache(cache, 4))


@pytest.mark.parametrize("number", [2.5, "3", None, True])
def test_a_number_of_new_tokens_is_an_integer(model, number):
    ids, message = prompt(9)[0], "max_new_tokens must be an integer, got"
    with pytest.raises(TypeError, match=message):
        generate(model, ids, METHOD, max_new_tokens=number)
    with pytest.raises(TypeError, match=message):
        decode(model, prefill(model, ids, METHOD), max_new_tokens=number)
    with pytest.raises(TypeError, match=message):
        StaticClaaCache(filled(model)[0], number)


def test_arguments_of_other_types_are_named(model):
    ids = prompt(9)[0]
    prefilled = prefill(model, ids, METHOD)
    for call, message in (
        (
            lambda: prefill(model, ids.tolist(), METHOD),
            "prefill: input_ids must be a tensor.*got list",
        ),
        (
            lambda: prefill("llama", ids, METHOD),
            "prefill: model must be a model of transformers, got str",
        ),
        (
            lambda: prefill(model, ids, METHOD, [[1] * 9]),
            "attention_mask must be a tensor.*got list",
        ),
        (
            lambda: prefill(model, ids, METHOD, prepared=(1, 2)),
            "prefill: prepared must be what method.pre",
        ),
        (lambda: decode(model, ids, max_new_tokens=1), "decode: prefilled must be what prefill"),
        (
            lambda: decode(model, prefilled, max_new_tokens=1, eos_token_id="</s>"),
            "eos_token_id must be a token or several of them, got '</s>'",
        ),
        (lambda: ClaaCache(model, METHOD), "ClaaCache: config must be that of a model, got Llama"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_no_turn_comes_after_a_beam_search(model, cache):
    """The rows of the cache are its last beams, in whatever order."""
    settings = {**SETTINGS, "num_beams": 3}
    model.generate(prompt(40)[0], past_key_values=cache, **settings)
    with pytest.raises(ValueError, match=r"beam search must be the last turn.*call reset\(\)"):
        model.generate(prompt(70, seed=5)[0], past_key_values=cache, **settings)
    cache.reset()
    model.generate(prompt(70, seed=5)[0], past_key_values=cache, **settings)


def test_generate_stays_within_the_context(model, cache):
    settings = {**SETTINGS, "max_new_tokens": 218}
    with pytest.raises(ValueError, match="context of 256 tokens, got one of 40 and 218 may follow"):
        model.generate(prompt(40)[0], past_key_values=cache, **settings)


def test_what_was_decoded_is_not_decoded_again(model):
    prefilled = prefill(model, prompt(30)[0], METHOD)
    decode(model, prefilled, max_new_tokens=3)
    with pytest.raises(ValueError, match="must be decoded once.*call prefill again"):
        decode(model, prefilled, max_new_tokens=3)


def test_a_forward_that_failed_half_way_is_noticed(model, cache):
    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(IDS, past_key_values=cache)
    finally:
        handle.remove()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"did not end.*call reset\(\) and prefill again"):
            model(IDS[:, :1], past_key_values=cache)
        cache.reset()
        assert model(IDS, past_key_values=cache).logits.shape[1] == 20


def test_a_cache_of_another_model_is_refused(model):
    deep = ClaaCache(build("llama", num_hidden_layers=6).config, METHOD)
    with pytest.raises(ValueError, match="one of this model, which has 4 layers, got one of 6"):
        model(IDS, past_key_values=deep)


def test_hidden_states_and_attentions_are_of_the_tokens_that_a_layer_sees():
    model = attach(build("llama", attention="eager"))
    with torch.no_grad():
        output = model(
            IDS,
            past_key_values=ClaaCache(model.config, METHOD),
            output_hidden_states=True,
            output_attentions=True,
        )
    assert [hidden.shape[1] for hidden in output.hidden_states] == [40, 40, 40, 20, 20]
    assert [attention.shape[2:] for attention in output.attentions] == [(40, 40)] * 2 + [
        (20, 20)
    ] * 2


# generate() of transformers.


@pytest.mark.parametrize("chunk", [1, 16, 40, 99])
@pytest.mark.parametrize("where", ["argument", "configuration", "model"])
def test_prefill_in_chunks_is_refused(model, cache, chunk, where):
    arguments = {}
    if where == "argument":
        arguments = {**SETTINGS, "prefill_chunk_size": chunk}
    elif where == "configuration":
        arguments = {"generation_config": GenerationConfig(**SETTINGS, prefill_chunk_size=chunk)}
    before = copy.deepcopy(model.generation_config)
    if where == "model":
        arguments, model.generation_config.prefill_chunk_size = SETTINGS, chunk
    try:
        with pytest.raises(ValueError, match=f"prefill_chunk_size must be None.*got {chunk}"):
            model.generate(IDS, past_key_values=cache, **arguments)
    finally:
        model.generation_config = before
    assert cache.get_seq_length() == 0


def test_without_the_cache_generate_is_as_before(model):
    plain = build("llama")
    for arguments in ({}, {"prefill_chunk_size": 16}, {"use_cache": False}):
        tokens = model.generate(IDS, attention_mask=MASK, **SETTINGS, **arguments)
        assert torch.equal(
            tokens, plain.generate(IDS, attention_mask=MASK, **SETTINGS, **arguments)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_cache": False}, "use_cache must not be False"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "speculative decoding"),
        ({"assistant_model": build("llama", num_hidden_layers=2)}, "speculative decoding"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_ways_to_generate_that_are_not_served(model, cache, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(IDS[:1], past_key_values=cache, **SETTINGS, **arguments)


def test_several_answers_to_a_prompt_are_served(model):
    torch.manual_seed(0)
    settings = {**SETTINGS, "do_sample": True, "num_return_sequences": 3}
    cache = ClaaCache(model.config, METHOD)
    tokens = model.generate(IDS[:1], past_key_values=cache, **settings)
    assert tokens.shape == (3, 44) and cache.layers[0].keys.shape[0] == 3
    longer = torch.cat([tokens, prompt(5, 5, 5)[0]], dim=1)
    assert model.generate(longer, past_key_values=cache, **SETTINGS).shape == (3, 53)


def test_embeddings_serve_generate(model):
    embeddings = model.get_input_embeddings()(IDS[:1])
    caches = [ClaaCache(model.config, METHOD) for _ in range(2)]
    tokens = model.generate(inputs_embeds=embeddings, past_key_values=caches[0], **SETTINGS)
    expected = model.generate(IDS[:1], past_key_values=caches[1], **SETTINGS)
    assert torch.equal(tokens, expected[:, 40:])


@pytest.mark.parametrize("length", [1, 20, 43, 44, 90])
@pytest.mark.parametrize("named", [False, True])
def test_a_second_prompt_is_refused(model, cache, length, named):
    model.generate(IDS[:1], past_key_values=cache, **SETTINGS)
    other, held = prompt(length, seed=9)[0], cache.lengths
    arguments = {"past_key_values": cache, **SETTINGS}
    message = "must begin with the 43 tokens that the cache has seen and have more.*call reset"
    with pytest.raises(ValueError, match=message):
        _ = (
            model.generate(input_ids=other, **arguments)
            if named
            else model.generate(other, **arguments)
        )
    assert cache.lengths == held
    cache.reset()
    tokens = model.generate(other, **arguments)
    fresh = {**arguments, "past_key_values": ClaaCache(model.config, METHOD)}
    assert torch.equal(tokens, model.generate(other, **fresh))


def test_turns_are_no_second_prompt(model):
    turn = prompt(6, 6, seed=3)[0]
    ones = torch.ones(2, 10, dtype=MASK.dtype)
    caches, answers = [ClaaCache(model.config, METHOD) for _ in range(2)], []
    for cache in caches:
        tokens = model.generate(IDS, attention_mask=MASK, past_key_values=cache, **SETTINGS)
        longer, mask = torch.cat([tokens, turn], dim=1), torch.cat([MASK, ones], dim=1)
        if cache is caches[1]:  # the turn alone, and the token that was not fed
            longer = longer[:, 43:]
        answer = model.generate(longer, attention_mask=mask, past_key_values=cache, **SETTINGS)
        answers.append(answer[:, -4:])
    assert torch.equal(*answers)
    assert caches[0].tokens is not None and caches[1].tokens is None  # the whole is not known
    caches[0].reorder_cache(torch.tensor([1, 0]))
    assert caches[0].tokens is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 20), 99), r"input_ids must be in \[0, 98\], the vocabulary.*got 99"),
        (torch.full((1, 20), -1), r"input_ids must be in \[0, 98\], the vocabulary.*got -1"),
        (torch.zeros(1, 0, dtype=torch.int64), "prompt_length must be at least 1, got 0"),
        (torch.tensor([[]]), "prompt_length must be at least 1, got 0"),
        (torch.zeros(0, 9, dtype=torch.int64), "input_ids must have one row or more, got 0"),
        (torch.zeros(9, dtype=torch.int64), r"must have shape \[batch, tokens\], got \[9\]"),
        (torch.zeros(1, 9), "input_ids must be int64 or int32, got torch.float32"),
        (torch.ones(1, 257, dtype=torch.int64), "context of 256 tokens, got one of 257"),
    ],
    ids=["beyond", "negative", "empty", "empty list", "no row", "1-D", "float", "long"],
)
@pytest.mark.parametrize("door", ["prefill", "generate", "answer", "transformers"])
def test_prompts_that_are_none(model, cache, door, ids, message):
    call = {
        "prefill": lambda: prefill(model, ids, METHOD),
        "generate": lambda: generate(model, ids, METHOD, max_new_tokens=2),
        "answer": lambda: answer_attention(model, ids, 2),
        "transformers": lambda: model.generate(ids, past_key_values=cache, **SETTINGS),
    }[door]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", [name for name in PROMPTS if "attention_mask" in PROMPTS[name][0]])
def test_masks_that_are_none(model, name):
    mask, message = PROMPTS[name][0]["attention_mask"], PROMPTS[name][1]
    for call in (
        lambda: prefill(model, IDS, METHOD, mask),
        lambda: generate(model, IDS, METHOD, attention_mask=mask, max_new_tokens=2),
        lambda: answer_attention(model, IDS, 2, attention_mask=mask),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The model's context.


def test_prompt_and_answer_may_fill_the_context(model):
    ids = prompt(250)[0]
    fits = generate(model, ids, METHOD, max_new_tokens=7)  # the last of them is not fed
    assert fits.shape == (1, 7)
    assert answer_attention(model, ids, 9)[0].shape == (1, 7)  # it ends where the context does
    for door, call in (
        ("generate", lambda: generate(model, ids, METHOD, max_new_tokens=8)),
        ("decode", lambda: decode(model, prefill(model, ids, METHOD), max_new_tokens=8)),
    ):
        message = (
            f"{door}: the prompt must fit into the model's context of 256 tokens, got one of 250"
        )
        with pytest.raises(ValueError, match=message + " and 8 may follow"):
            call()
    # GemFilter answers after the tokens that it chose, which are fewer.
    assert generate(model, ids, GemFilter(keep=20, layer=1), max_new_tokens=30).shape == (1, 30)
    assert prefill(model, prompt(256)[0], METHOD).logits.isfinite().all()


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        (None, 256),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_scaled_rotary_embeddings_reach_further(rope, tokens):
    changes = {} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    model = build("llama", **changes)
    assert context_length(model.config) == tokens
    if tokens > 256:
        assert prefill(model, prompt(300)[0], METHOD).logits.isfinite().all()


# StaticClaaCache.


def test_a_static_cache_knows_its_model_and_its_room(model):
    cache, _ = filled(model)
    token = IDS[:, :1]
    with pytest.raises(TypeError, match="cache must be a ClaaCache, got LlamaConfig"):
        StaticClaaCache(model.config, 4)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        StaticClaaCache(cache, 0)
    with torch.no_grad():
        with pytest.raises(
            RuntimeError, match=r"StaticClaaCache: the model must be attached, call"
        ):
            build("llama")(token, past_key_values=StaticClaaCache(cache, 2))
        with pytest.raises(ValueError, match="which has 6 layers, got one of 4"):
            deep = attach(build("llama", num_hidden_layers=6))
            deep(token, past_key_values=StaticClaaCache(cache, 2))
        static = StaticClaaCache(cache, 2)
        for _ in range(2):
            model(token, past_key_values=static)
        with pytest.raises(ValueError, match="fit into the room for 0 that is left, got 1"):
            model(token, past_key_values=static)
    longer = torch.cat([IDS, token], dim=1)
    for length in ({"max_new_tokens": 4}, {"max_length": 45}):
        settings = {"past_key_values": StaticClaaCache(cache, 3), "pad_token_id": 0, **length}
        with pytest.raises(ValueError, match="fit into the room for 3 that is left, got 4"):
            model.generate(longer, **settings)
    settings = {**settings, "past_key_values": StaticClaaCache(cache, 4)}
    assert model.generate(longer, **settings).shape == (2, 45)


# The watch on generate costs nothing else.


def test_models_are_freed_copied_and_named_as_before():
    model = attach(build("llama"))
    assert model.generate.__func__ is type(model).generate and "generate" not in vars(model)
    alive = weakref.ref(model)
    del model
    assert alive() is None
    cache = ClaaCache(build("llama").config, FullKV())
    assert pickle.loads(pickle.dumps(cache)).get_seq_length() == 0
