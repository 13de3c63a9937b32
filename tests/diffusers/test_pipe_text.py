"""Text encoders come and go, and a call says how text is encoded: what becomes of the negative."""

import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from drawing import assert_same_image, draw, relative_error
from nasa_diffusers import NASA, VSF, enable_nasa, nasa, testing
from oracle import algorithm_1
from transformers import T5Config, T5EncoderModel

SIZE = {"height": 32, "width": 48, "max_sequence_length": 16}


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    # diffusers 0.35 cleans Wan's prompts with the package ftfy whether it is there or not
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def encoded(pipe, **options):
    """A prompt of FLUX.1 as its embeddings: what a call without encoders needs."""
    embeds, pooled, _ = pipe.encode_prompt("a cat", None, device="cpu", **options)
    return {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def kept(handle):
    """The embeddings of the negative prompt that the last call used."""
    return handle._guidances[0].settings.negative.terms[0].embeds


class Calls:
    """Counts how often a pipeline encodes."""

    def __init__(self, pipe):
        self.stock, self.count = pipe.encode_prompt, 0
        pipe.encode_prompt = self
        self.__signature__ = inspect.signature(self.stock)

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.stock(*args, **kwargs)


# ---- encoders that go ----------------------------------------------------------------------------


def unload(pipe):
    pipe.text_encoder_2 = None


def unload_with_tokenizer(pipe):
    pipe.text_encoder_2 = pipe.tokenizer_2 = None


def unload_the_tokenizer(pipe):
    pipe.tokenizer_2 = None


def unload_everything(pipe):
    pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None


def delete(pipe):
    del pipe.text_encoder_2


def move_to_meta(pipe):
    pipe.text_encoder_2.to("meta")


class Standin:
    """What people put in the place of an encoder to satisfy those who ask it for its dtype."""

    dtype, device = torch.float32, torch.device("cpu")


class StandinModule(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")


def replace_by_an_object(pipe):
    pipe.text_encoder_2 = Standin()


def replace_by_a_module(pipe):
    pipe.text_encoder_2 = StandinModule()


def replace_by_a_smaller_model(pipe):
    config = testing.T5_SIZE | {"d_model": 8, "d_kv": 2}
    pipe.text_encoder_2 = T5EncoderModel(T5Config(**config))


def replace_the_tokenizer_by_an_object(pipe):
    pipe.tokenizer_2 = Standin()


GONE = [
    unload,
    unload_with_tokenizer,
    unload_the_tokenizer,
    unload_everything,
    delete,
    move_to_meta,
    replace_by_an_object,
    replace_by_a_module,
    replace_by_a_smaller_model,
    replace_the_tokenizer_by_an_object,
]


@pytest.mark.parametrize("go", GONE, ids=lambda f: f.__name__)
def test_the_negative_stays_in_use(go):
    pipe = testing.flux()
    call = encoded(pipe, max_sequence_length=16) | SIZE
    stock = draw(pipe, steps=2, **call)
    with nasa(pipe, "blurry", alpha=0.5, max_sequence_length=8) as handle:
        expected = draw(pipe, steps=2, **call)
        assert relative_error(expected, stock) > 1e-3
        go(pipe)
        assert torch.equal(draw(pipe, steps=2, **call), expected)
        handle.alpha = 0.25
        assert not torch.equal(draw(pipe, steps=2, **call), expected)


@pytest.mark.parametrize("go", GONE, ids=lambda f: f.__name__)
def test_the_negative_of_enable_nasa_is_the_one_of_the_first_call(go):
    """Unloaded before the first call, as people do who encode all prompts first."""
    pipe, other = testing.flux(), testing.flux()
    call = encoded(pipe) | SIZE | {"max_sequence_length": 512}
    with nasa(other, "blurry", alpha=0.5):
        expected = draw(other, **call)
    with nasa(pipe, "blurry", alpha=0.5):
        go(pipe)
        assert torch.equal(draw(pipe, **call), expected)


@pytest.mark.parametrize("build", [testing.stable_diffusion, testing.pixart, testing.wan])
def test_of_every_family(build):
    pipe = build()
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    call = {"prompt": None, "prompt_embeds": text}
    if build is testing.pixart:
        call["prompt_attention_mask"] = torch.ones(1, 7)
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe, **call)
        pipe.text_encoder = None
        assert torch.equal(draw(pipe, **call), expected)


def test_an_option_for_which_it_was_not_encoded():
    """Needed, and it cannot be done: never an image with another negative."""
    pipe = testing.flux()
    call = encoded(pipe, max_sequence_length=16)
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe, **call | SIZE)
        pipe.text_encoder_2 = None
        # options that were met before are known
        assert torch.equal(draw(pipe, **call | SIZE), expected)
        draw(pipe, **call | SIZE | {"max_sequence_length": 512})
        with pytest.raises(RuntimeError) as error:
            draw(pipe, **call | SIZE | {"max_sequence_length": 24})
        said = str(error.value)
        assert "this call encodes text with max_sequence_length=24" in said
        assert "text_encoder_2 of FluxPipeline is gone" in said
        assert "name max_sequence_length in enable_nasa" in said


def test_the_scale_of_loras_that_are_elsewhere():
    """Without one in the text encoder it says nothing of the text, whether that is there or not."""
    pipe = testing.flux()
    call = encoded(pipe, max_sequence_length=16) | SIZE
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe, **call)
        calls = Calls(pipe)
        assert torch.equal(draw(pipe, **call, joint_attention_kwargs={"scale": 0.5}), expected)
        assert calls.count == 1  # the pipeline's own
        pipe.text_encoder_2 = None
        assert torch.equal(draw(pipe, **call, joint_attention_kwargs={"scale": 0.25}), expected)


def test_encoders_that_never_were():
    pipe = testing.flux()
    pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match="text_encoder_2 of this FluxPipeline is not loaded"):
        enable_nasa(pipe, "blurry")


def test_an_encoder_that_comes_back():
    pipe = testing.flux()
    call = encoded(pipe, max_sequence_length=16)
    t5 = pipe.text_encoder_2
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        pipe.text_encoder_2 = None
        draw(pipe, **call | SIZE | {"max_sequence_length": 512})
        pipe.text_encoder_2 = t5
        draw(pipe, **call | SIZE)
        assert kept(handle).shape[1] == 16
        # and one that has learnt meanwhile
        with torch.no_grad():
            t5.shared.weight.mul_(2)
        draw(pipe, **call | SIZE)
        expected, *_ = pipe.encode_prompt("blurry", None, device="cpu", max_sequence_length=16)
        assert torch.equal(kept(handle), expected)


def test_an_encoder_that_moves_is_not_run_again():
    """What `.to(device)` and offloading leave: other memory, and buffers that are other objects."""
    pipe = testing.stable_diffusion()
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
        calls = Calls(pipe)
        for module in pipe.text_encoder.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.clone()
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
        assert torch.equal(draw(pipe), expected)
        assert calls.count == 1  # the prompt
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
        calls.count = 0
        draw(pipe)
        assert calls.count == 1


@pytest.mark.parametrize("build", [testing.flux, testing.stable_diffusion], ids=["flux", "sd"])
def test_encoders_are_freed_with_their_pipeline(build):
    """A second pipeline without encoders, and `del` of the first, as to save memory."""
    pipe = build()
    large = "text_encoder_2" if build is testing.flux else "text_encoder"
    call = {"prompt": None, "prompt_embeds": torch.ones(1, 7, 32)}
    if build is testing.flux:
        call |= {"pooled_prompt_embeds": torch.ones(1, 32), "height": 32, "width": 48}
    handle = enable_nasa(pipe, "blurry", alpha=0.5)
    expected = draw(pipe, **call)
    encoders = {name: None for name in pipe.components if name.startswith(("text_", "tokenizer"))}
    second = type(pipe).from_pipe(pipe, **encoders)
    second.set_progress_bar_config(disable=True)
    gone = [weakref.ref(pipe), weakref.ref(getattr(pipe, large)), weakref.ref(pipe.tokenizer)]
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    assert torch.equal(draw(second, **call), expected)
    assert handle.is_enabled and "blurry" in str(handle.report())
    with pytest.raises(ValueError, match="pipeline that NASA was enabled on is gone"):
        handle.set_negative_prompt("red")
    handle.set_negative_prompt(negative_prompt_embeds=torch.ones(1, 3, 32))
    assert not torch.equal(draw(second, **call), expected)


def test_a_second_pipeline_encodes_when_the_first_is_gone():
    pipe = testing.stable_diffusion()
    handle = enable_nasa(pipe, "blurry", alpha=0.5)
    second = type(pipe).from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    del pipe
    gc.collect()
    draw(second)
    with torch.no_grad():
        next(second.text_encoder.parameters()).mul_(2)
    draw(second)
    assert torch.equal(kept(handle), second.encode_prompt("blurry", "cpu", 1, False)[0])


# ---- options of the call -------------------------------------------------------------------------

INSTRUCTION = ["make it nice.", "user prompt- "]
LONG = "blurry and red, with fur and letters"
# of a family: what a call says, and how its own prompt is encoded then
OPTIONS = {
    "pixart": [
        {"max_sequence_length": 6},
        {"max_sequence_length": 20},
        {"clean_caption": True, "max_sequence_length": 20},
        {},
    ],
    "sana": [
        {"max_sequence_length": 6},
        {"complex_human_instruction": INSTRUCTION},
        {"clean_caption": True},
        {},
    ],
    "wan": [{"max_sequence_length": 6}, {"max_sequence_length": 20}, {}],
}
BUILD = {"pixart": testing.pixart, "sana": testing.sana, "wan": testing.wan}
# of `draw`, or of the pipeline where a call does not say
CALLED = {
    "pixart": {"clean_caption": False},
    "sana": {"complex_human_instruction": None},
    "wan": {"max_sequence_length": 512},
}


@pytest.mark.parametrize("family", OPTIONS)
def test_the_negative_is_encoded_as_the_prompt_of_the_call(family, monkeypatch):
    pipe, oracle = BUILD[family](), BUILD[family]()
    for each in (pipe, oracle):
        if hasattr(each, "_text_preprocessing"):
            # the cleaning itself needs packages; which of the two ways was taken shows like this
            monkeypatch.setattr(
                each, "_text_preprocessing",
                lambda text, clean_caption=False: [
                    t.replace("a", "") if clean_caption else t
                    for t in ([text] if isinstance(text, str) else text)
                ],
            )  # fmt: skip
    model, found = oracle.transformer, []
    with nasa(pipe, LONG, alpha=0.5) as handle:
        for options in OPTIONS[family]:
            # Sana-Sprint aside, all of them have this argument
            embeds, mask, *_ = oracle.encode_prompt(
                LONG, do_classifier_free_guidance=False, device="cpu", **CALLED[family] | options
            )
            text = embeds
            if family == "wan":
                text, mask = model.condition_embedder.text_embedder(embeds), None
            else:
                text = model.caption_projection(embeds)
                text = model.caption_norm(text) if family == "sana" else text
            with algorithm_1(model, [(text, None if mask is None else mask.bool(), 0.5)]):
                expected = draw(oracle, **options)
            assert_same_image(draw(pipe, **options), expected)
            found.append(kept(handle))
    # each option does something by itself
    assert not any(
        a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, found[1:], strict=False)
    )


@pytest.mark.parametrize("build", [testing.flux, testing.stable_diffusion_3], ids=["flux", "sd3"])
def test_the_length_of_joint_models(build):
    """FLUX.1 schnell has no more than 256 tokens, and SD3 counts 77 of CLIP besides."""
    pipe, size = build(), {"height": 32, "width": 48}
    clip = 0 if build is testing.flux else 77
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        for length in (24, 16):
            draw(pipe, **size, max_sequence_length=length)
            assert handle.report().keys_pos == handle.report().keys_neg == clip + length
            expected, *_ = pipe.encode_prompt(
                "blurry", prompt_2=None, device="cpu", max_sequence_length=length,
                **({"prompt_3": None, "do_classifier_free_guidance": False} if clip else {}),
            )  # fmt: skip
            assert torch.equal(kept(handle), expected)
    with nasa(pipe, "blurry", alpha=0.5, max_sequence_length=8) as handle:
        draw(pipe, **size, max_sequence_length=24)
        assert handle.report().keys_neg == clip + 8


def test_two_pipelines_with_options_of_their_own_take_turns():
    """Neither encodes again when the other has been called."""
    pipe = testing.flux()
    second = type(pipe).from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    with nasa(pipe, "blurry", alpha=0.5):
        images = [draw(pipe, **SIZE), draw(second, **SIZE | {"max_sequence_length": 24})]
        calls = Calls(pipe)
        for _ in range(2):
            assert torch.equal(draw(second, **SIZE | {"max_sequence_length": 24}), images[1])
        assert calls.count == 0


# ---- tokens that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize("build", [testing.stable_diffusion, testing.stable_diffusion_xl])
def test_tokens_beyond_77_are_counted(build):
    with nasa(build(), "a" * 100) as handle:
        # each letter is a token, and two more open and close the prompt
        assert handle.report().dropped == (100 + 2 - 77,)
        assert "(77 tokens, 25 dropped by tokenizer" in str(handle.report())
        handle.set_negative_prompt("a" * 75)
        assert handle.report().dropped == (0,) and "dropped" not in str(handle.report())
    with nasa(build(), [("a" * 80, 0.5), ("b", 0.5)]) as handle:
        assert handle.report().dropped == (5, 0)


@pytest.mark.parametrize(
    ("build", "dropped"),
    [
        (testing.pixart, {"tokenizer": 13}),
        (testing.sana, {"tokenizer": 13}),
        (testing.wan, {"tokenizer": 13}),
        (testing.flux, {"tokenizer_2": 13}),
        # CLIP reads 77 tokens, two of them its own; T5 8, one of them its own
        (
            testing.stable_diffusion_3,
            {"tokenizer": 80 + 2 - 77, "tokenizer_2": 80 + 2 - 77, "tokenizer_3": 80 + 1 - 8},
        ),
    ],
)
def test_tokens_beyond_max_sequence_length_are_counted(build, dropped):
    letters = 80 if build is testing.stable_diffusion_3 else 20
    with nasa(build(), "a" * letters, max_sequence_length=8) as handle:
        assert handle._guidances[0].settings.negative.terms[0].dropped == dropped
        assert handle.report().dropped == (max(dropped.values()),)
        assert f"{max(dropped.values())} dropped by" in str(handle.report())


def test_tokens_of_the_length_of_the_call():
    pipe = testing.flux()
    with nasa(pipe, "a" * 20) as handle:
        assert handle.report().dropped == (0,)
        draw(pipe, **SIZE)
        assert handle.report().dropped == (20 + 1 - 16,)


# ---- padding in one softmax ----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["prompt", "prompts", "embeds"])
def test_vsf_leaves_out_the_padding_of_wan(given):
    """As the published code, which encodes the negative prompt without any."""
    from test_pipe_methods import PlainFlip, everywhere, projected

    pipe, plain = testing.wan(), testing.wan()
    # as the published pipeline: what the encoder makes of the tokens that there are
    rows = []
    for prompt in ("blurry", "red and fur")[: 2 if given == "prompts" else 1]:
        ids = plain.tokenizer(prompt, return_tensors="pt").input_ids
        rows.append(plain.text_encoder(ids)[0][0])
    text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(text.shape[1]) < torch.tensor([[len(row)] for row in rows])
    if given == "embeds":
        padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        options = {"negative_prompt_embeds": padded}
    else:
        options = {"negative_prompt": ["blurry", "red and fur"] if len(rows) == 2 else "blurry"}
    prompt = ["a cat", "a dog"][: len(rows)]
    with nasa(pipe, method=VSF(1.5), **options) as handle:
        ours = draw(pipe, prompt, steps=2)
        assert handle.report().keys_neg == text.shape[1] < 20
    with everywhere(plain, lambda m: PlainFlip(projected(m, text), mask, 1.5)):
        expected = draw(plain, prompt, steps=2)
    assert_same_image(ours, expected)
    with nasa(pipe, method=NASA(1.5), **options) as handle:
        assert handle.report().keys_neg == 512


def test_vsf_leaves_out_the_padding_of_flux():
    pipe = testing.flux()
    with nasa(pipe, "blurry", VSF()) as handle:
        draw(pipe, **SIZE)
        ids = pipe.tokenizer_2("blurry", return_tensors="pt").input_ids
        assert torch.allclose(kept(handle), pipe.text_encoder_2(ids)[0], atol=1e-6)
        handle.set_negative_prompt(["blurry", "red"])
        (term,) = handle._guidances[0].settings.negative.terms
        assert term.mask.sum(1).tolist() == [len("blurry") + 1, len("red") + 1]
    # a length that is named is padded to
    with nasa(pipe, "blurry", VSF(), max_sequence_length=12) as handle:
        assert kept(handle).shape[1] == 12


def test_vsf_leaves_out_the_padding_of_sd3():
    pipe = testing.stable_diffusion_3()
    with nasa(pipe, "blurry", VSF()) as handle:
        embeds = kept(handle)
    full, *_ = pipe.encode_prompt(
        "blurry", None, None, device="cpu", do_classifier_free_guidance=False,
        max_sequence_length=len("blurry") + 1,
    )  # fmt: skip
    clip = len("blurry") + 2
    assert torch.equal(embeds, torch.cat([full[:, :clip], full[:, 77:]], dim=1))
    # and of an SD3 without its T5, whose place is taken by zeros
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    with nasa(pipe, "blurry", VSF()) as handle:
        assert kept(handle).shape[1] == clip
