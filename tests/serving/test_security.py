"""TLS and tokens of `rtresnet serve`, with usable and unusable files."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import rtresnet
from rtresnet.cli.main import main
from rtresnet.core.errors import InputError
from rtresnet.serving.config import check_tls
from tests.serving.conftest import served

if shutil.which("openssl") is None:
    pytest.skip("needs openssl", allow_module_level=True)


def make_pair(folder: Path, kind: str = "rsa:2048") -> tuple[Path, Path]:
    """Return a self-signed certificate and its key."""
    folder.mkdir()
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    algorithm = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run(
        ["openssl", "req", "-x509", *(["-newkey", kind] if kind != "ec" else algorithm), "-nodes",
         "-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("tls") / "one")


def garbage(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    (folder / "garbage.pem").write_text("hello")
    return folder / "garbage.pem", key, "garbage.pem"


def garbage_key(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    (folder / "garbage.pem").write_bytes(b"\xff\x00")
    return certificate, folder / "garbage.pem", "garbage.pem"


def empty(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    (folder / "empty.pem").touch()
    return folder / "empty.pem", key, "empty.pem"


def swapped(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    return key, certificate, "key.pem: not a certificate"


def missing(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    return certificate, folder / "missing.pem", "missing.pem"


def other_key(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    _, other = make_pair(folder / "other")
    return certificate, other, "other/key.pem: not the private key of"


def other_kind(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    _, other = make_pair(folder / "ec", "ec")
    return certificate, other, "ec/key.pem: not the private key of"


def encrypted(certificate: Path, key: Path, folder: Path) -> tuple[Path, Path, str]:
    file = folder / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", file],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, file, "encrypted.pem: is encrypted"


CASES = [garbage, garbage_key, empty, swapped, missing, other_key, other_kind, encrypted]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_check_tls_unusable_files_are_named(
    pair: tuple[Path, Path], tmp_path: Path, case: Callable[..., tuple[Path, Path, str]]
) -> None:
    certificate, key, name = case(*pair, tmp_path)
    with pytest.raises(InputError) as caught:
        check_tls(certificate, key)
    assert name in str(caught.value)


@pytest.mark.parametrize("grpc", [[], ["--no-grpc"]])
def test_serve_unusable_certificate_is_exit_code_2_before_it_listens(
    models: Path, pair: tuple[Path, Path], tmp_path: Path, grpc: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken = tmp_path / "broken.pem"
    broken.write_text("hello")
    arguments = ["--certificate", str(broken), "--key", str(pair[1]), "--port", "0", *grpc]
    assert main(["serve", str(models / "resnet8.onnx"), *arguments]) == 2
    output = capsys.readouterr()
    assert str(broken) in output.err and "in use" not in output.err
    assert "://" not in output.out


@pytest.mark.parametrize("kind", ["rsa:2048", "ec"])
def test_serve_with_tls_answers_over_https_and_grpc(
    models: Path, tmp_path: Path, kind: str
) -> None:
    import grpc

    certificate, key = make_pair(tmp_path / "pair", kind)

    def ask(lines: list[str]) -> object:
        context = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(f"{lines[0]}/v2/health/ready", context=context) as response:
            assert response.status == 200
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(lines[1].removeprefix("grpc://"), credentials) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
            assert call(b"", timeout=20)
        return lines[0]

    config = rtresnet.ServeConfig(port=0, grpc_port=0, certificate=certificate, key=key, grace=1)
    assert str(served([models / "resnet8.onnx"], ask, config)).startswith("https://")


def test_server_that_cannot_start_is_never_announced(
    models: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from rtresnet.serving.server import Server

    certificate = Path(shutil.copy(pair[0], tmp_path / "certificate.pem"))
    config = rtresnet.ServeConfig(port=0, grpc=False, certificate=certificate, key=pair[1], grace=0)
    server = Server([models / "resnet8.onnx"], rtresnet.load, lambda data: None, config)  # type: ignore[arg-type, return-value]
    server.load()
    certificate.unlink()  # after the check
    announced: list[list[str]] = []
    with pytest.raises(OSError):
        server.run(announced.append)
    assert announced == []


@pytest.mark.parametrize("token", ["short", "two words of enough length", "\udcff" * 20])
def test_serve_unusable_token_is_exit_code_2(
    models: Path, tmp_path: Path, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_bytes(token.encode(errors="surrogateescape"))
    arguments = ["--token-file", str(file), "--port", "0", "--no-grpc"]
    assert main(["serve", str(models / "resnet8.onnx"), *arguments]) == 2
    assert str(file) in capsys.readouterr().err
