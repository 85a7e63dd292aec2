"""Runs on texts by the command line: training, samples in the course of it, drawing with a prompt, going on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from src.data.tokenizers import CharacterTokenizer
from src.experiment import load_data_of
from src.runs import Run
from tests.commands import Said, call, run_cli

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(200, 0, -1))
SMALL = (
    "data=text_file",
    "model=transformer",
    "data.context=16",
    "network.num_layers=1",
    "network.num_heads=2",
    "network.width=16",
    "network.dropout=0.1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=10",
    "loader.batch_size=8",
    "training.log_every_n_steps=5",
    "metric=[]",
)


def trained(folder: Path, root: Path, *overrides: str) -> Said:
    return call(
        "train", *SMALL, f"data.path={root / 'text.txt'}", f"data.cache={root}", f"hydra.run.dir={folder}", *overrides
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a text and the runs on it."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    """A finished training of two epochs."""
    said = trained(root / "run", root, "trainer.max_epochs=2")
    assert said.code == 0, said.text
    return Run.open(root / "run")


def drawn(run: Run, *arguments: str) -> Said:
    return call("sample", f"run={run.path}", *arguments)


def test_log_names_the_weights_that_decay(run):
    assert "weight decay 0.1 on 6 tensors" in (run.path / "log.txt").read_text()


def test_texts_are_written_in_the_course_of_the_training(run):
    files = sorted(run.samples.glob("*.txt"))
    assert [file.name for file in files] == ["samples_epoch_0001.txt", "samples_epoch_0002.txt"]
    first = files[0].read_text()
    assert first.count("--- sample") == 8
    assert set(first.partition("---\n")[2][:10]) <= set(TEXT)


def test_text_is_drawn_after_a_prompt_without_the_data(run, root, tmp_path):
    text = root / "text.txt"
    text.rename(root / "away.txt")
    try:
        said = drawn(run, "prompt=9 bottles", "temperature=0.5", "top_k=5", "length=12", "n=3", f"out={tmp_path / 'drawn'}")
    finally:
        (root / "away.txt").rename(text)
    assert said.code == 0, said.text
    files = sorted((tmp_path / "drawn").glob("*.txt"))
    assert [file.name for file in files] == ["00000.txt", "00001.txt", "00002.txt"]
    texts = [file.read_text() for file in files]
    assert all(one.startswith("9 bottles") and len(one) == 9 + 12 for one in texts)
    assert all(one in said.text for one in texts)
    assert "temperature=0.5; top_k=5" in said.text
    assert "sees at most 16 tokens" in said.text


def test_text_ends_with_the_stop_and_is_the_same_up_to_there(run, tmp_path):
    draw = ("n=2", "length=60", "seed=3")
    assert drawn(run, *draw, f"out={tmp_path / 'whole'}").code == 0
    assert drawn(run, *draw, "stop=\\n", f"out={tmp_path / 'ended'}").code == 0
    for name in ("00000.txt", "00001.txt"):
        whole, ended = ((tmp_path / folder / name).read_text() for folder in ("whole", "ended"))
        assert ended == whole[: (whole + "\n").index("\n") + 1]


def test_prompt_longer_than_the_context_is_cut_and_said(run, tmp_path):
    said = drawn(run, "prompt=" + " ".join(["beer"] * 8), "n=1", "length=2", f"out={tmp_path}")
    assert said.code == 0
    assert "the prompt has 39 tokens, of which model=transformer sees the last 16" in said.text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["prompt='Émile'"], r"prompt='Émile' cannot be read by model=transformer: 'É', 'm', 'i' "),
        (["top_k=0"], "top_k=0 must be at least 1"),
        (["length=0"], "length=0 must be at least 1"),
        (["picture=reconstruction", "prompt=9"], "prompt=9 cannot be asked .* picture=reconstruction has no texts"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(run, arguments, what, tmp_path):
    said = drawn(run, *arguments, f"out={tmp_path}")
    assert said.code == 1
    assert re.search(what, " ".join(said.text.split())), said.text
    assert "Traceback" not in said.text


@pytest.mark.parametrize("prompt", ["1e1", "010", "[1]"])
def test_prompt_that_reads_as_a_number_is_taken_as_it_was_written(run, tmp_path, prompt):
    said = drawn(run, f"prompt={prompt}", "stop=1e9", "n=1", "length=2", f"out={tmp_path}")
    if prompt == "[1]":
        assert "'[', ']' (first at character 0" in said.text
    else:
        assert said.code == 0, said.text
        assert (tmp_path / "00000.txt").read_text().startswith(prompt)


def test_checkpoint_of_another_vocabulary_of_equal_size_is_refused_and_both_are_named(run, tmp_path):
    other = Path(shutil.copytree(run.path, tmp_path / "other"))
    checkpoint = torch.load(other / "checkpoints" / "best.ckpt", weights_only=True)
    own = CharacterTokenizer("".join(sorted(set(TEXT)))).vocabulary
    assert checkpoint["vocabulary"] == own
    theirs = own.partition(",")[0] + ", 0123456789ab"
    torch.save(checkpoint | {"vocabulary": theirs}, other / "checkpoints" / "best.ckpt")
    said = drawn(Run.open(other), "n=1")
    assert said.code == 1
    assert f"best.ckpt was trained on other tokens: on {theirs}, and here are {own}; take a checkpoint" in said.text
    assert "Traceback" not in said.text


def test_tokenizer_of_a_folder_that_is_gone_is_that_of_the_run(run):
    config = run.config()
    OmegaConf.update(config, "data.tokenizer", {"_target_": "src.data.tokenizers.Pretrained", "path": "/gone"})
    data = load_data_of(run, config)
    assert data.arrays.tokenizer.vocabulary == CharacterTokenizer("".join(sorted(set(TEXT)))).vocabulary
    assert config.data.tokenizer.path == "/gone"  # what the run was made with is not changed


def test_curve_by_position_is_among_the_pictures(run):
    said = call("evaluate", f"run={run.path}", "metric=[nats_by_position]")
    assert said.code == 0, said.text
    assert (run.samples / "nats_by_position.png").stat().st_size > 1000
    curve = json.loads((run.path / "results.json").read_text())["metrics"]["nats_by_position"]["curve"]
    assert curve["places"] == ["1", "2", "3 to 4", "5 to 8", "9 to 16"]
    assert list(curve["rows"]) == ["", "uniform", "unigram", "5-gram"]
    assert "beside uniform" in said.text
    assert " xz " in said.text


@pytest.mark.slow
def test_resumed_training_is_the_same_to_the_bit(run, root):
    half = root / "half"
    said = trained(half, root, "trainer.max_epochs=1", "training.schedule.examples=160.0")  # of both epochs
    assert said.code == 0, said.text
    assert call("train", f"resume={half}", "trainer.max_epochs=2").code == 0
    files = (folder / "checkpoints" / "last.ckpt" for folder in (half, run.path))
    resumed, whole = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "lstm", "gpt2"])
def test_training_on_two_devices_is_that_on_one_and_is_resumed_to_the_bit(root, tmp_path, model):
    if model == "gpt2":
        pytest.importorskip("transformers", reason="transformers is not installed (make extra EXTRA=text)")

    def of(name: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    sizes = [one for one in SMALL if not one.startswith(("model=", "loader."))]
    sizes = [one for one in sizes if model != "lstm" or "num_heads" not in one]
    line = [*sizes, f"model={model}", f"data.path={root / 'text.txt'}", f"data.cache={root}", "network.dropout=0.0"]
    line += ["training.schedule.examples=160.0", "callback.pictures.num_samples=2"]
    two = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "loader.batch_size=4")
    alone = call("train", *line, "loader.batch_size=8", "trainer.max_epochs=2", f"hydra.run.dir={tmp_path / 'alone'}")
    assert alone.code == 0, alone.text
    for name, epochs in (("both", 2), ("half", 1)):
        said = run_cli("train", *line, *two, f"trainer.max_epochs={epochs}", f"hydra.run.dir={tmp_path / name}")
        assert said.code == 0, said.text
    said = run_cli("train", f"resume={tmp_path / 'half'}", "trainer.max_epochs=2")
    assert said.code == 0, said.text
    whole, both, resumed = of("alone"), of("both"), of("half")
    for key, weight in whole.items():
        assert torch.equal(resumed[key], both[key])
        torch.testing.assert_close(both[key], weight, rtol=0, atol=1e-4)  # Adam makes much of little gradients
    assert any(not torch.equal(weight, torch.zeros_like(weight)) for weight in whole.values())


def test_changed_text_is_told_from_the_one_that_was_trained_on(run, root, tmp_path):
    text = root / "text.txt"
    text.write_text(TEXT + "é")
    try:
        said = call("evaluate", f"run={run.path}", "metric=[test_loss]")
    finally:
        text.write_text(TEXT)
    assert said.code == 1
    assert "have changed since its training" in said.text
