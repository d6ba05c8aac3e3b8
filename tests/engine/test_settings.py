"""Environment over config file over defaults, and every value knows where it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dtp_engine.backends import job_storage_uri
from dtp_engine.errors import UsageError
from dtp_engine.settings import SETTINGS, Settings, config_path, load_settings, resolve


def config(tmp_path: Path, text: str, **variables: str) -> dict[str, str]:
    """An environment whose config file holds `text`."""
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "USER": "ana", **variables}
    path = config_path(environ)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return environ


def test_defaults(tmp_path: Path) -> None:
    """Without any configuration the state lies where XDG says and the user is the actor."""
    settings = load_settings({"XDG_STATE_HOME": str(tmp_path), "USER": "ana", "HOME": "/nowhere"})
    assert settings.home == tmp_path / "dtp"
    assert settings.actor.startswith("ana@")
    assert settings == Settings(home=settings.home, actor=settings.actor)


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """Each layer wins over the one below, and is named as the origin."""
    text = "# mine\ncontroller_idle: 10m\nzygote_idle: 1h\n"
    environ = config(tmp_path, text, DTP_ZYGOTE_IDLE="30", DTP_HOME="/srv/dtp", DTP_BACKEND="")
    settings = load_settings(environ)
    assert (settings.controller_idle_s, settings.zygote_idle_s) == (600.0, 30.0)
    assert settings.home == Path("/srv/dtp")
    origins = {each.setting.name: each.origin for each in resolve(environ)}
    assert origins["controller_idle"] == f"{config_path(environ)}:2"
    assert origins["zygote_idle"] == "DTP_ZYGOTE_IDLE"
    assert origins["backend"] == "default"


def test_storage_is_a_folder_or_a_bucket(tmp_path: Path) -> None:
    """`storage` takes a folder or an S3 URI; a job that began in the folder of before stays there,
    where its checkpoints are."""
    environ = config(tmp_path, "storage: s3://bucket/team\n")
    storage = load_settings(environ).storage
    assert storage == "s3://bucket/team"
    assert load_settings({**environ, "DTP_STORAGE_ROOT": "home"}).storage is None
    (tmp_path / "storage" / "jobs" / "old").mkdir(parents=True)
    assert job_storage_uri(tmp_path, "new", storage) == "s3://bucket/team/jobs/new"
    assert job_storage_uri(tmp_path, "old", storage) == (tmp_path / "storage/jobs/old").as_uri()
    with pytest.raises(UsageError, match=r"config.yaml:1: storage: cannot open storage 'gs://x'"):
        load_settings(config(tmp_path, "storage: gs://x\n"))


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n"])
def test_an_empty_config_is_no_mistake(tmp_path: Path, text: str) -> None:
    """A config file without a setting changes nothing."""
    assert load_settings(config(tmp_path, text)).backend == "local"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hom: /x\n", 'config.yaml:1: hom: unknown setting; did you mean "home"?'),
        ("controller_idle: soon\n", 'config.yaml:1: controller_idle: "soon" is not a duration'),
        ("actor: [a]\n", "config.yaml:1: actor: expected one value, found a list"),
        ("actor: a\nactor: b\n", "config.yaml:2: actor: written twice"),
        ("home:\n", "config.yaml:1: home: expected one value, found nothing"),
        ("\tactor: a\n", "config.yaml:1: a tab"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    """A mistake in the config file is one line with its place, and a usage error."""
    with pytest.raises(UsageError) as caught:
        load_settings(config(tmp_path, text))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_mistakes_name_the_variable(tmp_path: Path) -> None:
    """A mistake in a variable names the variable."""
    with pytest.raises(UsageError, match=r"^DTP_LEASE_TTL: lease_ttl: must be at least 1s"):
        load_settings(config(tmp_path, "", DTP_LEASE_TTL="0.1"))


def test_every_field_has_a_setting() -> None:
    """Nothing in the settings object is out of reach of the config file."""
    assert [s.field for s in SETTINGS] == [f.name for f in dataclasses.fields(Settings)]
