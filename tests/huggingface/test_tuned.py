"""A saved setting is found again for the same model, and for no other."""

import copy

import pytest
import torch

from claa_ops.huggingface.models import InputError
from claa_ops.huggingface.tuned import find_tuned, model_identity, save_tuned, tuned_method
from claa_ops.methods import CLAA, Peak
from claa_ops.prefill import attach
from support.tiny_checkpoint import tiny_model

FACTS = {
    "method": "peak",
    "settings": {"layer": 2, "keep": 0.2, "keep_kv": 1.0},
    "sentence": "It is good.",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAA_OPS_CACHE", str(tmp_path))
    return tmp_path


def test_a_copy_is_the_same_model_in_another_dtype_and_attached_too():
    model = tiny_model()
    identity = model_identity(model)
    assert model_identity(copy.deepcopy(model)) == identity
    assert model_identity(attach(copy.deepcopy(model))) == identity
    # Weights that were published in bfloat16 are the same numbers in both.
    published = copy.deepcopy(model).to(torch.bfloat16)
    assert model_identity(published) == model_identity(copy.deepcopy(published).float())


def test_other_weights_names_and_settings_are_another_model():
    model = tiny_model()
    identities = {model_identity(model)}
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[3].mlp.up_proj.weight += 0.01
    identities.add(model_identity(tuned))
    wider = copy.deepcopy(model)
    wider.config.rope_parameters = {**wider.config.rope_parameters, "rope_theta": 5e5}
    identities.add(model_identity(wider))
    shallow = copy.deepcopy(model)
    del shallow.model.layers[-1]
    identities.add(model_identity(shallow))
    assert len(identities) == 4


def test_what_is_saved_is_found_again_for_this_model_alone(folder):
    model, other = tiny_model(), tiny_model().half()
    assert find_tuned(model) is None
    with pytest.raises(LookupError, match="nothing is saved for this model in .*tuned: `claa-ops"):
        tuned_method(model)
    file = save_tuned(model, FACTS)
    assert file.parent == folder / "tuned" and [file] == list(file.parent.iterdir())
    assert tuned_method(model) == Peak(layer=2, keep=0.2, keep_kv=1.0)
    found = find_tuned(model)
    assert (found.sentence, found.facts, found.file) == ("It is good.", FACTS, file)
    with torch.no_grad():
        other.model.embed_tokens.weight += 1
    assert find_tuned(other) is None
    save_tuned(model, {**FACTS, "method": "claa"})
    assert isinstance(tuned_method(model), CLAA)


@pytest.mark.parametrize(
    "content",
    [
        "{half",
        '{"method": "peak"}',
        '{"method": "no such", "settings": {}, "sentence": ""}',
        '{"method": "peak", "settings": {"of_old": 1}, "sentence": ""}',
        '{"method": "peak", "settings": {"layer": 50}, "sentence": ""}',
        "[]",
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_place(content):
    model = tiny_model()
    file = save_tuned(model, FACTS)
    file.write_text(content)
    with pytest.raises(InputError, match=r"cannot use .*\.json, which `claa-ops tune` saved"):
        tuned_method(model)


def test_a_folder_that_cannot_be_written_is_refused(folder):
    (folder / "tuned").write_text("in the way")
    with pytest.raises(InputError, match="cannot save into .*CLAA_OPS_CACHE names another"):
        save_tuned(tiny_model(), FACTS)
