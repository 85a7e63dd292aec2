"""Texts as data: how they are read, cut and tokenized, and the windows that models see."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.core.errors import UserError
from src.core.spec import DISCRETE, DataSpec, Values
from src.core.tokens import hash_of_texts
from src.data.arrays import Arrays, Split
from src.data.loading import ArrayData
from src.data.text import shakespeare, text_file
from src.data.token_windows import TokenWindows
from src.data.tokenizers import (
    BytePairs,
    Bytes,
    Characters,
    CharacterTokenizer,
    Pretrained,
    TokenizerMaker,
    read_tokenizer,
    stop_at,
)

ODD = "naïve\tЖ\r\n\u2028 \U0001d518\U0001d52b e\u0301 日本\n\n  x \ufeff\x7f"
TEXT = "".join(f"{i}. So it goes, and {i * i} again.\n" + "\n" * (i % 3) for i in range(60)) + ODD


def needs_library() -> None:
    pytest.importorskip("tokenizers", reason="byte pairs need the library tokenizers")


def written(folder: Path, text: str | bytes, name: str = "book.txt") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def prepared(
    path: Path | str,
    cache: Path,
    tokenizer: TokenizerMaker | None = None,
    context: int = 8,
    val_share: float = 0.05,
    test_share: float = 0.1,
) -> Arrays:
    return text_file(str(path), str(cache), tokenizer or Characters(), context, val_share, test_share)


# --- tokenizers ------------------------------------------------------------------------------------------------------

MAKERS = {"character": Characters, "byte": Bytes, "bpe": lambda: BytePairs(300)}


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> TokenizerMaker:
    if request.param == "bpe":
        needs_library()
    return MAKERS[request.param]()


def test_tokens_become_the_text_again(maker):
    tokenizer = maker.make(TEXT, TEXT[:500])
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.num_tokens
    assert tokenizer.decode(tokens) == TEXT


def test_tokenizer_is_the_same_after_a_journey_through_json(maker):
    tokenizer = maker.make(TEXT, TEXT[:500])
    again = read_tokenizer(json.loads(json.dumps(tokenizer.to_json())))
    assert again.num_tokens == tokenizer.num_tokens
    assert torch.equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_empty_text_has_no_tokens(maker):
    tokenizer = maker.make(TEXT, TEXT)
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode(torch.zeros(0, dtype=torch.int64)) == ""


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_bytes_and_byte_pairs_know_text_that_they_have_never_seen(name):
    if name == "bpe":
        needs_library()
    tokenizer = MAKERS[name]().make("abc", "abc")
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD


def test_characters_are_numbered_in_their_order():
    tokenizer = Characters().make("hello b", "")
    assert tokenizer.encode(" behlo").tolist() == [0, 1, 2, 3, 4, 5]


def test_byte_pairs_are_learned_from_the_training_part_alone():
    needs_library()
    training = "the cat the cat the cat " * 50
    tokenizer = BytePairs(280).make(training + "zyzzyva " * 500, training)
    assert len(tokenizer.encode(" cat")) == 1
    assert len(tokenizer.encode("zyzzyva")) == 7


def test_long_text_is_cut_into_parts_where_no_byte_pair_reaches_across(monkeypatch):
    needs_library()
    tokenizer = BytePairs(400).make(TEXT, TEXT)
    whole = tokenizer.encode(TEXT)
    monkeypatch.setattr("src.data.tokenizers._AT_A_TIME", 50)
    assert torch.equal(tokenizer.encode(TEXT), whole)


def test_unknown_characters_are_named_with_the_place_of_the_first():
    tokenizer = CharacterTokenizer("abc")
    with pytest.raises(UserError, match=r"'é', 'z' \(first at character 2, .*\) .* 3 characters .*tokenizer=byte"):
        tokenizer.encode("abézé")


@pytest.mark.parametrize("num_tokens", [256, 65_537, 300.5, "many"])
def test_vocabulary_of_byte_pairs_has_its_limits(num_tokens):
    with pytest.raises(UserError, match=rf"tokenizer\.num_tokens={num_tokens} must be .* 257 to 65,536"):
        BytePairs(num_tokens)


def test_tokenizer_of_a_folder_of_weights(tmp_path):
    needs_library()
    own = BytePairs(300).make(TEXT, TEXT)
    (tmp_path / "tokenizer.json").write_text(json.loads(own.to_json())["tokenizer"])
    assert torch.equal(Pretrained(str(tmp_path)).make("", "").encode(TEXT), own.encode(TEXT))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Pretrained(str(tmp_path)).make("", "")
    with pytest.raises(UserError, match=r"tokenizer\.path=nowhere holds no tokenizer\.json"):
        Pretrained("nowhere")


def test_tokenizer_is_read_from_whatever_keeps_it_and_is_the_same_source(tmp_path):
    needs_library()
    own = BytePairs(300).make(TEXT, TEXT)
    files = {"tokenizer.json": json.loads(own.to_json())["tokenizer"], "tokens.json": own.to_json()}
    files["spec.json"] = json.dumps({"name": "made_up", "tokenizer": own.to_json()})
    makers = [Pretrained(str(written(tmp_path / name, text, name))) for name, text in files.items()]
    makers += [Pretrained(str(tmp_path / name)) for name in ("tokenizer.json", "tokens.json")]  # the folders
    assert len({json.dumps(maker.source()) for maker in makers}) == 1
    assert {maker.make("", "").to_json() for maker in makers} == {own.to_json()}
    letters = CharacterTokenizer("abc")
    kept = Pretrained(str(written(tmp_path / "letters", letters.to_json(), "tokens.json").parent))
    assert kept.make("", "").vocabulary == letters.vocabulary


def test_vocabulary_tells_tokens_apart_that_are_as_many():
    needs_library()
    assert CharacterTokenizer("abc").vocabulary.startswith("3 characters, ")
    pairs = [BytePairs(270).make("", training) for training in ("the cat " * 50, "the dog " * 50)]
    others = [Bytes().make("", ""), CharacterTokenizer("abc"), CharacterTokenizer("abd"), *pairs]
    assert len({some.vocabulary for some in others}) == 5
    again = read_tokenizer(
        json.dumps({"kind": "byte pairs", "tokenizer": json.loads(pairs[0].to_json())["tokenizer"] + " "})
    )
    assert again.vocabulary == pairs[0].vocabulary  # written otherwise, it is the same


def test_tokenizer_that_changes_the_text_is_refused(tmp_path):
    library = pytest.importorskip("tokenizers")
    lossy = library.Tokenizer.from_str(json.loads(BytePairs(300).make(TEXT, TEXT).to_json())["tokenizer"])
    lossy.normalizer = library.normalizers.Lowercase()
    file = written(tmp_path, lossy.to_str(), "tokenizer.json")
    book = written(tmp_path, "so it goes. " * 30 + "So it goes. " * 30)
    with pytest.raises(
        UserError, match=r"book\.txt cannot be cut .* ' it goes\. So it goes' becomes ' it goes\. so it goes'"
    ):
        prepared(book, tmp_path / "cache", Pretrained(str(file)), val_share=0.4, test_share=0.4)
    few = library.Tokenizer(library.models.WordLevel({"so": 0, "it": 1, "?": 2}, unk_token="?"))
    few.pre_tokenizer = library.pre_tokenizers.Whitespace()
    file = written(tmp_path / "few", few.to_str(), "tokenizer.json")
    with pytest.raises(UserError, match=r"the tokenizer changes the text, 'so it goes' becomes 'so it \?'"):
        Pretrained(str(file)).make("", "").encode("so it goes")


@pytest.mark.parametrize("described", ["{", "[]", '{"kind": "words"}', '{"kind": "characters"}'])
def test_description_of_a_tokenizer_that_is_none_is_refused(described):
    with pytest.raises(UserError, match="tokenizer"):
        read_tokenizer(described)


def test_a_text_has_come_where_its_last_token_is(maker):
    tokenizer = maker.make(TEXT, TEXT)
    tokens = tokenizer.encode("1. So it goes, and\n\n")
    has_come = [bool(stop_at(tokenizer, "goes")(tokens[None, :end])) for end in range(1, len(tokens) + 1)]
    ends = [end for end in range(1, len(tokens) + 1) if "goes" in tokenizer.decode(tokens[:end])]
    assert has_come.index(True) + 1 == ends[0]


# --- reading and cutting ---------------------------------------------------------------------------------------------


def test_text_is_cut_between_characters_before_it_is_tokenized(tmp_path, maker):
    text = "".join("é日a x"[i % 5] for i in range(1000))
    arrays = prepared(written(tmp_path, text), tmp_path / "cache", maker, context=2)
    parts = {
        split: arrays.tokenizer.decode(torch.from_numpy(stream.copy()).long()) for split, stream in arrays.streams.items()
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 855, "val": 45, "test": 100}
    assert parts["val"] + parts["train"] + parts["test"] == text


def test_without_a_validation_part_the_test_part_stands_for_it_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    arrays = prepared(written(tmp_path, TEXT), tmp_path / "cache", val_share=0.0)
    assert np.array_equal(arrays.streams["val"], arrays.streams["test"])
    assert sum(len(arrays.streams[split]) for split in ("train", "test")) == len(TEXT)
    assert "best checkpoint is chosen by the test part" in caplog.text


def test_tokens_are_kept_in_16_bits_once_for_any_context(tmp_path):
    file = written(tmp_path, TEXT)
    arrays = [prepared(file, tmp_path / "cache", context=context) for context in (8, 20)]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert all(stream.dtype == np.uint16 for stream in arrays[0].streams.values())
    assert arrays[0].fingerprint == arrays[1].fingerprint
    assert [some.spec.shape for some in arrays] == [(9,), (21,)]


def test_spec_of_a_text_keeps_its_tokenizer_through_json(tmp_path):
    spec = prepared(written(tmp_path, TEXT), tmp_path / "cache").spec
    again = DataSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert read_tokenizer(again.tokenizer).num_tokens == spec.values.levels == len(set(TEXT))


def test_hash_of_a_text_is_kept_and_the_same_whatever_its_tokens_are(tmp_path, maker):
    arrays = prepared(written(tmp_path, TEXT), tmp_path / "cache", maker)
    texts = [arrays.tokenizer.decode(torch.from_numpy(arrays.streams[some].astype(np.int64))) for some in ("train", "test")]
    assert arrays.text_sha256 == hash_of_texts(*texts)
    assert arrays.text_sha256 != hash_of_texts("".join(texts))


def test_other_tokenizer_is_other_data(tmp_path):
    file = written(tmp_path, "abab" * 100)  # as many characters as bytes, so the streams have the same length
    assert prepared(file, tmp_path / "cache").fingerprint != prepared(file, tmp_path / "cache", Bytes()).fingerprint


def test_files_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    folder = tmp_path / "books"
    for name, text in {
        "b.txt": "bbb" * 50,
        "a/z.md": "\ufeffaaa" * 1 + "a" * 50,
        ".hidden": "???",
        "c.txt": "ccc\n" * 30,
    }.items():
        written(folder, text, name)
    arrays = prepared(folder, tmp_path / "cache", context=2)
    whole = "".join(
        arrays.tokenizer.decode(torch.from_numpy(arrays.streams[split].astype(np.int64)))
        for split in ("val", "train", "test")
    )
    assert whole == "a" * 53 + "\n" + "bbb" * 50 + "\n" + "ccc\n" * 30


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; give text"),
        (b"abc\xff\xfe", r"is no text in UTF-8 \(its byte 3, counted from 0, is 0xff"),
        (b"MZ\x90" + bytes(10), "is no text but binary \\(its byte 3"),
        (b"too short", r"the training part of .* has 7 tokens, too few for data\.context=8"),
        ("".join(map(chr, range(0x10000, 0x20002))).encode(), r"65,538 different characters.*tokenizer=byte"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_name(tmp_path, content, said):
    file = written(tmp_path, content)
    with pytest.raises(UserError, match=said) as refusal:
        prepared(file, tmp_path / "cache")
    assert str(file) in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"context": 0}, r"data\.context=0 must be a whole number of at least 1"),
        ({"context": 10_000}, r"too few for data\.context=10000"),
        ({"test_share": 0.0}, r"data\.test_share=0\.0 must be a share between 0 and 1"),
        ({"val_share": 1.0}, r"data\.val_share=1\.0 must be a share between 0 and 1, or 0\.0 for none"),
    ],
)
def test_setting_that_no_text_can_have_is_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        prepared(written(tmp_path, TEXT), tmp_path / "cache", **settings)


def test_place_without_a_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=nowhere does not exist"):
        prepared("nowhere", tmp_path)
    with pytest.raises(UserError, match="there is no file in"):
        prepared(tmp_path, tmp_path / "cache")


def test_shakespeare_must_be_the_known_one(tmp_path):
    arguments = (str(tmp_path), str(tmp_path / "cache"), Characters(), 8, 0.05, 0.1)
    with pytest.raises(UserError, match=r"data=shakespeare is not under .*DATA_ROOT"):
        shakespeare(*arguments)
    written(tmp_path, TEXT, "tinyshakespeare/input.txt")
    with pytest.raises(UserError, match=r"has the MD5 .*6fb458f1232090904fb40fe944165e91.*data=text_file"):
        shakespeare(*arguments)


# --- windows ---------------------------------------------------------------------------------------------------------


def of_stream(length: int, context: int, batch_size: int = 4, seed: int = 0) -> ArrayData:
    """A stream whose tokens are their own places."""
    windows = TokenWindows(np.arange(length, dtype=np.uint16), context)
    spec = DataSpec("made_up", "tokens", (context + 1,), Values(DISCRETE, low=0, high=length - 1, levels=length))
    split = Split(windows, None)
    arrays = Arrays(spec, length, {"train": split, "val": split, "test": split}, "made_up")
    return ArrayData(arrays, batch_size=batch_size, eval_batch_size=3, num_workers=0, seed=seed)


@pytest.mark.parametrize(("length", "context"), [(101, 10), (109, 10), (11, 10), (7, 1)])
def test_every_held_out_token_but_the_first_is_predicted_once(length, context):
    batches = list(of_stream(length, context).held_out_loader("test"))
    x = torch.cat([batch.x for batch in batches])
    assert x.dtype == torch.int64
    assert x.shape == ((length - 1) // context, context + 1)
    predicted = x[:, 1:].flatten()
    assert torch.equal(predicted, torch.arange(1, len(predicted) + 1))
    assert length - 1 - len(predicted) < context  # at the end, too few for a window


def test_training_windows_begin_anywhere_and_anew_in_each_epoch():
    data = of_stream(length=5000, context=10)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        x = torch.cat([batch.x for batch in loader])
        assert len(x) == 499 // 4 * 4
        assert torch.equal(x, x[:, :1] + torch.arange(11))
        epochs.append(x[:, 0])
    starts = torch.cat(epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert 0 <= starts.min() < 100
    assert 4890 < starts.max() <= 5000 - 11
    assert len(starts.unique()) > 850  # of 992 drawn from 4990, about 900
    assert (torch.bincount(starts % 10, minlength=10) > 60).all()  # at all offsets


def test_last_window_of_a_stream_is_drawn_too():
    data = of_stream(length=12, context=10, batch_size=1)
    loader = data.train_dataloader()
    starts = set()
    for epoch in range(30):
        loader.sampler.set_epoch(epoch)
        starts |= {int(batch.x[0, 0]) for batch in loader}
    assert starts == {0, 1}


def test_windows_depend_on_the_seed_and_the_epoch_not_on_the_batch():
    def starts(batch_size: int, seed: int = 0) -> list[int]:
        return sorted(int(x[0]) for batch in of_stream(500, 10, batch_size, seed).train_dataloader() for x in batch.x)

    assert starts(7) == starts(49)
    assert starts(7) != starts(7, seed=1)


@pytest.mark.parametrize(("done", "place"), [(2, (0, 2)), (3, (1, 0))])
def test_training_that_is_cut_to_few_batches_goes_on_at_the_start_of_the_next_epoch(done, place):
    data = of_stream(500, 10)
    data.train_dataloader()
    progress = SimpleNamespace(current=SimpleNamespace(ready=done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(num_training_batches=3, fit_loop=loop)  # of 12
    assert data.state_dict() == dict(zip(("epoch", "batches_done"), place, strict=True))
