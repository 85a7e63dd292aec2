"""GPT-2 of transformers as a network: the known traps, weights from folders, additions of low rank, and the way back."""

import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.pretrained import gpt2_config, weights_sha256
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.tokens import TokenChoice
from src.data.tokenizers import CharacterTokenizer
from src.experiment import require_vocabulary_of_weights
from src.jobs import named
from src.models.autoregressive import Autoregressive
from src.networks.lstm import LSTM
from src.networks.transformer import Transformer
from src.runs import Run, config_hash
from src.samplers.autoregressive import continue_tokens
from tests.commands import call

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make extra EXTRA=text)")
pytest.importorskip("peft", reason="peft is not installed (make extra EXTRA=text)")

from src.networks.gpt2 import GPT2, as_gpt2  # noqa: E402 - it is of no use without transformers

V, LENGTH = 11, 12
LETTERS = CharacterTokenizer("abcdefghijk")


def small_gpt2(num_tokens: int = V, length: int = LENGTH, **keys: object) -> GPT2:
    torch.manual_seed(0)
    return GPT2(
        **{"num_layers": 2, "num_heads": 2, "width": 8, "dropout": 0.0} | keys, num_tokens=num_tokens, length=length
    )


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return (V * SampleNoise(seed).uniform((rows, length), torch.zeros(()))).long()


def away_from_its_start(network: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that every one of them tells in the logits."""
    for i, weight in enumerate(network.parameters()):
        weight.data = 0.3 * SampleNoise(i).normal(tuple(weight.shape), weight)
    return network.eval()


def model_of(network: partial, length: int = LENGTH) -> Autoregressive:
    values = Values(DISCRETE, low=0, high=V - 1, levels=V)
    spec = DataSpec("made_up", "tokens", (length + 1,), values, tokenizer=LETTERS.to_json())
    return Autoregressive(spec, network, TokenChoice(), conditional=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights as transformers saves them, in bfloat16, with marks of their own."""
    path = tmp_path_factory.mktemp("weights")
    away_from_its_start(small_gpt2()).net.to(torch.bfloat16).save_pretrained(path)
    return path


def loaded(folder: Path, **keys: object) -> GPT2:
    network = small_gpt2(weights=str(folder), **keys)
    network.load_weights()
    return network


# --- the network ------------------------------------------------------------------------------------------------------


def test_sizes_of_nanogpts_configuration_for_cpus():
    network = small_gpt2(65, 64, num_layers=4, num_heads=4, width=128)
    assert sum(weight.numel() for weight in network.parameters()) == 809_856
    residual = network.net.transformer.h[0].mlp.c_proj.weight
    assert float(residual.detach().std()) == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)
    assert network.net.config.bos_token_id is None  # its own lie far outside of 65 tokens


def test_cached_logits_are_those_of_the_whole():
    network, x = away_from_its_start(small_gpt2()), tokens()
    whole, state, one_by_one = network(x), network.begin(3), []
    for token in x.unbind(1):
        logits, state = network.step(token, state)
        one_by_one.append(logits)
    torch.testing.assert_close(torch.stack(one_by_one, 1), whole, rtol=0, atol=1e-5)
    at_once, _ = network.read(x, network.begin(3))
    torch.testing.assert_close(at_once, whole[:, -1], rtol=0, atol=1e-5)


def test_text_beyond_the_positions_is_drawn_by_the_last_of_them():
    network = away_from_its_start(small_gpt2())
    draw = partial(continue_tokens, network, tokens(2, 5), 20, TokenChoice())
    cached, plain = draw(SampleNoise(1)), draw(SampleNoise(1), cached=False)
    assert all(torch.equal(a, b) and len(a) == 20 for a, b in zip(cached, plain, strict=True))


def test_loss_is_of_the_next_token_and_of_no_other():
    model = model_of(partial(GPT2, num_layers=2, num_heads=2, width=8, dropout=0.0))
    away_from_its_start(model.network)
    x = tokens(4, LENGTH + 1)
    logits = model.network(x[:, :-1])
    by_hand = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(4, LENGTH).mean(1)
    torch.testing.assert_close(model.loss(Batch(x))["loss"], by_hand)
    # transformers shifts by itself: its loss of the same tokens is that of its T - 1 predictions, of ours there are T
    theirs = model.network.net(input_ids=x[:1, :-1], labels=x[:1, :-1]).loss
    torch.testing.assert_close(theirs, F.cross_entropy(logits[0, :-1], x[0, 1:-1]))


def test_tied_weights_stay_one(tmp_path):
    network = small_gpt2()
    assert network.net.lm_head.weight is network.net.transformer.wte.weight
    other = small_gpt2()
    other.load_state_dict(away_from_its_start(network).state_dict())
    assert other.net.lm_head.weight is other.net.transformer.wte.weight
    assert torch.equal(other(tokens()), network(tokens()))


# --- weights from a folder --------------------------------------------------------------------------------------------


def test_weights_are_loaded_in_float32_and_trained_with_dropout(folder):
    network = loaded(folder, dropout=0.5)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert all(module.training for module in network.modules())
    assert not torch.equal(network(tokens()), network(tokens()))
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    torch.testing.assert_close(network.eval()(tokens()), reference.eval()(tokens()).logits, rtol=0, atol=1e-5)


def test_weights_come_before_the_first_step_and_only_then(folder):
    model = model_of(partial(GPT2, num_layers=1, num_heads=1, width=4, dropout=0.0, weights=str(folder)))
    before = model.network(tokens())
    model.prepare(lambda: [Batch(tokens(4, LENGTH + 1))], generator=StreamNoise(0))
    assert not torch.allclose(model.network(tokens()), before)
    assert torch.equal(model.network(tokens()), loaded(folder)(tokens()))


def test_network_is_rebuilt_without_its_folder(folder):
    there = loaded(folder)
    rebuilt = small_gpt2(weights="/gone", config=gpt2_config(str(folder)))
    rebuilt.load_state_dict(there.state_dict())
    assert torch.equal(rebuilt.eval()(tokens()), there.eval()(tokens()))
    with pytest.raises(UserError, match=r"network\.weights=/gone is no folder"):
        rebuilt.load_weights()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "/nowhere"}, "network.weights=/nowhere is no folder"),
        ({"num_tokens": 10}, r"weights of 11 tokens \(network.weights=.*\), the data has 10; .* tokenizer=pretrained"),
        ({"length": 13}, r"see 12 tokens at most .*; set data.context=12 or less, it is 13"),
        ({"weights": None, "lora_rank": 2}, "network.lora_rank adds to trained weights"),
        ({"lora_rank": 0}, "network.lora_rank=0 must be at least 1"),
        ({"lora_rank": 2, "lora_targets": ["c_foo"]}, r"lora_targets=\['c_foo'\] names no layer of GPT-2"),
        ({"condition_dim": 3}, "without a place for a class"),
        ({"weights": None, "num_heads": 3}, "width=8, which must be a multiple of num_heads=3"),
    ],
)
def test_what_does_not_fit_is_said(folder, keys, message):
    with pytest.raises(UserError, match=message):
        small_gpt2(**{"weights": str(folder)} | keys)


def test_rows_that_pad_a_vocabulary_are_left_out_and_that_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    padded = away_from_its_start(small_gpt2(num_tokens=64))
    padded.net.save_pretrained(tmp_path)
    network = loaded(tmp_path).eval()
    torch.testing.assert_close(network(tokens()), padded(tokens())[..., :V], rtol=0, atol=1e-6)
    assert network.net.lm_head.weight is network.net.transformer.wte.weight
    assert "has rows for 64 tokens; the last 53 stand for none of the tokenizer's" in caplog.text
    assert as_gpt2(network).config.vocab_size == V
    rebuilt = small_gpt2(weights="/gone", config=gpt2_config(str(tmp_path)))
    rebuilt.load_state_dict(network.state_dict())
    with pytest.raises(UserError, match="weights of 64 tokens"):
        small_gpt2(num_tokens=65, weights=str(tmp_path))
    small_gpt2(num_tokens=192).net.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"weights of 192 tokens .*, the data has 11;"):
        small_gpt2(weights=str(tmp_path))


def test_run_does_not_begin_with_other_weights_than_it_was_made_for(folder, tmp_path):
    there = str(shutil.copytree(folder, tmp_path / "there"))
    known = weights_sha256(there)
    assert known == weights_sha256(str(folder))
    small_gpt2(weights=there, sha256=known).load_weights()
    small_gpt2().net.save_pretrained(there)
    with pytest.raises(UserError, match=rf"holds other weights than when this run was made .* was {known[:12]}, now"):
        small_gpt2(weights=there, sha256=known, lora_rank=2).load_weights()
    assert weights_sha256(str(tmp_path)) is None


def test_a_padded_vocabulary_is_taken_only_where_the_folder_says_what_it_is(tmp_path):
    weights = small_gpt2(num_tokens=64).net.config
    config = OmegaConf.create({"network": {"weights": str(tmp_path), "config": weights.to_dict()}})
    arrays = SimpleNamespace(tokenizer=SimpleNamespace(num_tokens=11, vocabulary="11 letters"))
    data = SimpleNamespace(arrays=arrays, spec=SimpleNamespace(name="letters"))
    with pytest.raises(UserError, match=r"has 64 tokens and data=letters has 11.*tokenizer\.json"):
        require_vocabulary_of_weights(config, data)
    arrays.tokenizer.num_tokens = 64
    require_vocabulary_of_weights(config, data)  # as many: nobody knows, and the log says so


def test_a_job_that_has_a_checkpoint_does_not_need_the_folder_of_its_first_weights(folder, tmp_path):
    there = str(shutil.copytree(folder, tmp_path / "there"))
    config = OmegaConf.create({"seed": 0, "network": {"weights": there}, "model": {"network": {"weights": there}}})
    hydra = OmegaConf.create({"runtime": {"choices": {"model": "gpt2", "data": "letters"}}})
    made = named(config, hydra)
    elsewhere = named(OmegaConf.create({**config, "network": {"weights": f"{tmp_path}/./there"}}), hydra)
    elsewhere.model.network.weights = elsewhere.network.weights
    assert config_hash(made) == config_hash(elsewhere)  # another spelling of one folder
    job = Run(tmp_path / "job")
    (job.path / "checkpoints").mkdir(parents=True)
    (job.path / "checkpoints" / "last.ckpt").touch()
    job.set_status("done")
    OmegaConf.save(made, job.path / "config.yaml")
    shutil.rmtree(there)
    assert named(config, hydra, job).network.sha256 == made.network.sha256
    with pytest.raises(UserError, match="is no folder"):
        named(config, hydra)


def test_marks_of_begin_and_end_are_kept(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "there")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"bos_token_id": 3, "eos_token_id": 4}))
    network = loaded(there, lora_rank=1)
    assert (network.net.config.bos_token_id, network.net.config.eos_token_id) == (3, 4)
    assert (as_gpt2(network).config.bos_token_id, as_gpt2(network).config.eos_token_id) == (3, 4)
    (there / "config.json").write_text(json.dumps(config | {"bos_token_id": 50256, "eos_token_id": None}))
    assert loaded(there).net.config.bos_token_id is None  # of 11 tokens none has that number


def test_transformers_that_cannot_be_imported_whole_is_one_sentence(monkeypatch):
    class Broken:
        @property
        def GPT2LMHeadModel(self) -> None:
            raise OSError("libtorchaudio.so: undefined symbol: aoti_torch_abi_version")

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    with pytest.raises(UserError, match=r"pip uninstall torchaudio \(OSError: libtorchaudio.so: undefined symbol"):
        small_gpt2()


def test_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json"):
        small_gpt2(weights=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="holds weights of llama; only gpt2 is known"):
        small_gpt2(weights=str(tmp_path))


def test_weights_that_are_not_all_there_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    file = tmp_path / "some" / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if "h.0.mlp" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not all there: transformer\.h\.0\.mlp\.c_fc\.bias \(and 3 others\) is missing"):
        loaded(tmp_path / "some")


# --- additions of low rank --------------------------------------------------------------------------------------------


def test_additions_begin_at_nothing_are_all_that_is_trained_and_can_be_merged(folder):
    plain, network = loaded(folder).eval(), loaded(folder, lora_rank=2).eval()
    assert torch.equal(network(tokens()), plain(tokens()))
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for weight in trained.values()) == 2 * 2 * (8 + 24)  # of two layers c_attn
    away = {name: 0.3 * SampleNoise(7).normal(tuple(weight.shape), weight) for name, weight in trained.items()}
    network.load_state_dict(network.state_dict() | away)
    assert not torch.allclose(network(tokens()), plain(tokens()), atol=1e-3)
    torch.testing.assert_close(network.merged()(tokens()).logits, network(tokens()), rtol=0, atol=1e-5)
    rebuilt = small_gpt2(weights=str(folder), lora_rank=2).eval()
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt(tokens()), network(tokens()))


# --- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_our_transformer_is_a_gpt2(tmp_path, bias, tied):
    ours = away_from_its_start(Transformer(V, LENGTH, 2, 2, 8, 0.1, bias, tied))
    as_gpt2(ours).save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert ours(tokens()).std() > 0.1
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()), rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded(tmp_path).eval()(tokens()), ours(tokens()), rtol=0, atol=1e-5)


def test_other_networks_have_no_such_form():
    with pytest.raises(UserError, match="LSTM does not have the form of GPT-2"):
        as_gpt2(LSTM(V, LENGTH, 1, 4, 0.0, False))
    with pytest.raises(UserError, match="given a class"):
        as_gpt2(Transformer(V, LENGTH, 1, 1, 4, 0.0, True, True, condition_dim=3))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "transformer"])
def test_run_is_exported_loaded_by_transformers_and_trained_on(tmp_path, model):
    text, run, out, further = (tmp_path / name for name in ("text.txt", "run", "out", "further"))
    text.write_text("the cat sat on the mat, the dog sat on the log. " * 200)
    sizes = ["network.num_layers=1", "network.num_heads=1", "network.width=8", "metric=[nats_per_token]"]
    few = ["trainer.max_steps=20", "data.context=16", f"data.cache={tmp_path / 'cache'}", "trainer.accelerator=cpu"]
    given = ["data=text_file", f"data.path={text}", *few]
    bpe = ["tokenizer=bpe", "tokenizer.num_tokens=280"]
    assert call("train", f"model={model}", *given, *bpe, *sizes, f"hydra.run.dir={run}").code == 0
    assert call("export", f"run={run}", f"out={out}").code == 0
    assert "is there already" in call("export", f"run={run}", f"out={out}").text
    net = transformers.GPT2LMHeadModel.from_pretrained(out, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    x = torch.tensor([tokenizer("the cat")["input_ids"]])
    assert tokenizer.decode(x[0]) == "the cat"
    assert (net.generation_config.do_sample, net.generation_config.top_k) == (True, 0)
    assert net.generate(x, max_new_tokens=5).shape == (1, x.shape[1] + 5)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"bos_token_id": 6, "eos_token_id": 7}))
    begun = ["model=gpt2", f"network.weights={out}", "tokenizer=pretrained", f"tokenizer.path={out}", "network.lora_rank=2"]
    after = call("train", *begun, *given, sizes[-1], "trainer.max_steps=1", "optim.lr=0.0", f"hydra.run.dir={further}")
    assert after.code == 0
    nats = [
        json.loads((path / "results.json").read_text())["metrics"]["nats_per_token"]["value"] for path in (run, further)
    ]
    assert nats[1] == pytest.approx(nats[0], abs=1e-5)
    assert "are not trained" in after.text
    out.rename(tmp_path / "elsewhere")
    measured = call("evaluate", f"run={further}", "metric=[nats_per_token]")
    assert measured.code == 0, measured.text
    entry = json.loads((further / "results.json").read_text())["metrics"]["nats_per_token"]
    assert entry["value"] == nats[1]
    assert weights_sha256(str(tmp_path / "elsewhere"))[:12] in entry["card"]["model"]["began_with"]
    resumed = call("train", f"resume={further}", "trainer.max_steps=2")
    assert resumed.code == 0, resumed.text
    drawn = call("sample", f"run={further}", "prompt=the cat", "n=2")
    assert drawn.code == 0, drawn.text
    assert call("export", f"run={further}", f"out={tmp_path / 'again'}").code == 0
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", local_files_only=True)
    assert (net.config.bos_token_id, net.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (6, 7)
    assert net.generation_config.eos_token_id == 7
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    text.write_text("a dog, a cat, a log, a mat, and that is all of it. " * 200)
    begun[1] = f"network.weights={tmp_path / 'again'}"
    refused = call("train", *begun[:2], *given, *bpe, f"hydra.run.dir={tmp_path / 'refused'}")
    said = " ".join(refused.text.split())
    assert re.search(
        r"again is of other tokens, \d+ byte pairs, (\w+), than data=text_file, \d+ byte pairs, (?!\1)\w+;", said
    )
    assert "Traceback" not in refused.text
