import pytest

from hubert_fast.pretrain.config import PretrainConfig
from hubert_fast.pretrain.config_file import differences, read_config, write_config
from hubert_fast.pretrain.presets import PRESETS


@pytest.mark.parametrize("base", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_file_says_everything_whatever_it_is_laid_over(tmp_path, name, base):
    path = tmp_path / "config.toml"
    write_config(path, PRESETS[name])
    assert read_config(path, PRESETS[base]) == PRESETS[name]


def test_a_file_changes_only_what_it_names(tmp_path):
    path = tmp_path / "config.toml"
    optimizer = "[first.optimizer]\nlearning_rate = 1\nbetas = [0.5, 0.25]\n"
    path.write_text(optimizer + '[first.model]\nfeature_grad_mult = "none"\n')
    read = read_config(path, PretrainConfig())
    found = {name: now for name, _, now in differences(PretrainConfig(), read)}
    assert found == {
        "first.optimizer.learning_rate": 1.0,
        "first.optimizer.betas": (0.5, 0.25),
        "first.model.feature_grad_mult": None,
    }
    assert type(read.first.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = ", "cannot be read as TOML"),
        ("\xff\xfe\x00", "cannot be read as TOML"),
        ("sead = 1", "sead is no setting; here there are .*'seed'"),
        ("[data]\nbatch = 1.0", "data.batch is no setting; here there are .*'batch_seconds'"),
        ("data = 3", "data must be a table; got 3"),
        ('seed = "1"', "seed must be int; got '1'"),
        ("seed = true", "seed must be int; got True"),
        ("autocast = 1", "autocast must be bool; got 1"),
        ('device = "tpu"', r"device must be one of \['auto', 'cpu', 'cuda'\]; got 'tpu'"),
        ("[first.optimizer]\nbetas = [0.9]", r"first.optimizer.betas must be .*; got \[0.9\]"),
        ("[first]\nbatch_seconds = true", "first.batch_seconds must be float; got True"),
        ('[data]\nmicro_batch_seconds = "all"', r"micro_batch_seconds must be one of \['auto'\] or float; got 'all'"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"(?s)mine.toml.*{message}"):
        read_config(path, PretrainConfig())


@pytest.mark.parametrize(("text", "seconds"), [("175", 175.0), ("175.5", 175.5), ('"auto"', "auto")])
def test_seconds_of_a_micro_batch_are_a_number_or_auto(tmp_path, text, seconds):
    path = tmp_path / "config.toml"
    path.write_text(f"[data]\nmicro_batch_seconds = {text}\n")
    read = read_config(path, PretrainConfig())
    assert read.data.micro_batch_seconds == seconds and type(read.data.micro_batch_seconds) is type(seconds)
    write_config(path, read)
    assert read_config(path, PretrainConfig()) == read


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.toml"):
        read_config(tmp_path / "nowhere.toml", PretrainConfig())
