"""Create a container image's build folder, and a KServe manifest, that serve one artifact.

Needs neither Docker nor Kubernetes. The image runs `rtresnet serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import string
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet import __version__
from rtresnet.core import artifacts, atomic_io, hardware, provenance
from rtresnet.core.config import Config, option, parse_milliseconds
from rtresnet.core.errors import InputError
from rtresnet.workflows.package import LARGEST, PackageConfig, require_single_file
from rtresnet.workflows.triton_repository import require_model_name

if TYPE_CHECKING:
    from rtresnet.core.sidecar import Sidecar

# The extra that each kind of artifact needs, and the distribution of a plan's builder.
EXTRAS = {"cpu": "cpu", "gpu": "gpu", "tensorrt_rtx": "rtx", "tensorrt": "trt"}
USER = 10001
GRACE_SECONDS = 30  # default --grace of `rtresnet serve`
MANIFEST = string.Template("""\
# kubectl apply -f FILE. Needs KServe, KEDA, Prometheus and the image $name.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: $resource
  annotations:
    serving.kserve.io/deploymentMode: RawDeployment  # also called Standard since KServe 0.16
    serving.kserve.io/autoscalerClass: keda
spec:
  predictor:
    annotations:
      prometheus.io/scrape: "true"
      prometheus.io/port: "8000"
      prometheus.io/path: /metrics
    minReplicas: $min_replicas
    maxReplicas: $max_replicas
    autoScaling:
      metrics:
        - type: External
          external:
            metric:
              backend: prometheus
              serverAddress: $prometheus
              # mean milliseconds in the queue, times replicas
              query: $query
            target:
              type: Value
              value: "$target"
    terminationGracePeriodSeconds: $termination
    containers:
      - name: kserve-container
        image: $image
        args: $arguments
        ports:
          - {name: http, containerPort: 8000, protocol: TCP}
          - {name: grpc, containerPort: 8001, protocol: TCP}
        startupProbe:
          httpGet: {path: /v2/health/ready, port: 8000}
          periodSeconds: 2
          failureThreshold: 150
        readinessProbe:
          httpGet: {path: /v2/health/ready, port: 8000}
          periodSeconds: 2
          failureThreshold: 1
        livenessProbe:
          httpGet: {path: /v2/health/live, port: 8000}
          periodSeconds: 10
          timeoutSeconds: 5
        resources:
          requests:
            cpu: "$cpus"$gpu
          limits:
            cpu: "$cpus"$gpu
        securityContext:
          runAsNonRoot: true
          runAsUser: $user
          allowPrivilegeEscalation: false
          capabilities: {drop: [ALL]}
""")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """A container image and its autoscaling on Kubernetes.

    Attributes:
        image: Name of the image in the manifest; None for the model's name and version.
        cpus: Processors of a replica; also the number of threads of an ONNX file on a CPU.
        queue_target_ms: Mean time in the queue, in milliseconds, above which replicas are added.
        prometheus: Address of the Prometheus server that scrapes the replicas.
    """

    image: str | None = option(
        None, "Name of the image in the manifest.", default_text="the model's name and version"
    )
    min_replicas: int = option(1, "Smallest number of replicas on Kubernetes.", minimum=1)
    max_replicas: int = option(4, "Largest number of replicas on Kubernetes.", minimum=1)
    cpus: int = option(2, "Processors of a replica on Kubernetes.", minimum=1)
    queue_target_ms: float = option(
        10.0,
        "Mean time in the queue above which replicas are added, as in 10ms.",
        names=("--queue-target",),
        metavar="TIME",
        parse=parse_milliseconds,
        default_text="10ms",
    )
    prometheus: str = option(
        "http://prometheus-operated.monitoring.svc:9090",
        "Address of the Prometheus server that scrapes the replicas.",
        metavar="URL",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_replicas > self.max_replicas:
            raise InputError(
                f"--min-replicas {self.min_replicas}: more than --max-replicas {self.max_replicas}"
            )


@dataclass(frozen=True, kw_only=True)
class ServerPackageResult:
    """Files that were written.

    Attributes:
        artifact: The file that is served.
        name: Name of the model.
        version: Its version.
        image: Name of the image.
        docker: Folder with the Dockerfile; None if not requested.
        manifest: The KServe manifest; None if not requested.
        notes: What the machine needs.
    """

    artifact: Path
    name: str
    version: int
    image: str
    docker: Path | None
    manifest: Path | None
    notes: tuple[str, ...]


def package_server(
    path: str | os.PathLike[str],
    *,
    docker: str | os.PathLike[str] | None = None,
    kserve: str | os.PathLike[str] | None = None,
    config: PackageConfig | None = None,
    image: ImageConfig | None = None,
) -> ServerPackageResult:
    """Write a folder to build an image from, a KServe InferenceService, or both.

    Args:
        path: An ONNX file or a plan, with its sidecar.
        docker: New folder for the Dockerfile, the model, and the versions of the libraries.
        kserve: YAML file of the manifest.
        config: Name, version, batching and device of the model.
        image: Name of the image, and autoscaling.

    Returns:
        What was written.

    Raises:
        InputError: A file or an option that cannot be served, or a folder that exists.
        ArtifactError: The file does not have the hash that its sidecar states.
    """
    config, image = config or PackageConfig(), image or ImageConfig()
    path = atomic_io.require_file(path, fix="create it with: rtresnet export")
    if path.suffix.lower() not in (".onnx", ".plan"):
        raise InputError(
            f"{path}: the server runs only ONNX files and plans", fix="rtresnet export"
        )
    if docker is None and kserve is None:
        raise InputError("neither docker nor kserve is set", fix="name a folder or a file")
    sidecar = artifacts.verify(path)
    if sidecar is None or not sidecar.input_known:
        raise InputError(
            f"{path}: the server needs its preprocessing, which is unknown",
            fix=f"rtresnet adopt {path}",
        )
    if kserve is not None and config.max_wait_ms >= image.queue_target_ms:
        raise InputError(
            f"--queue-target {image.queue_target_ms:g}ms: requests wait up to "
            f"{config.max_wait_ms:g} ms for their batch, so the target is always exceeded",
            fix="raise --queue-target, or lower --max-wait",
        )
    server = _server(path, sidecar, config, image)
    notes = _notes(server, sidecar, image, kserve is not None)
    docker = None if docker is None else Path(docker)
    kserve = None if kserve is None else Path(kserve)
    text = ""
    if kserve is not None:
        text = manifest(server, image)
        atomic_io.require_text_place(kserve)
    if docker is not None:
        _write_folder(docker, path, sidecar, server)
    if kserve is not None:
        atomic_io.write_text(kserve, text)
    return ServerPackageResult(
        artifact=path,
        name=server.name,
        version=server.version,
        image=server.image,
        docker=docker,
        manifest=kserve,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Server:
    """Contents of the image, and its start command."""

    file: str  # the model's file in its version folder
    name: str
    version: int
    image: str
    runs_on: str  # a key of EXTRAS
    arguments: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        return self.runs_on != "cpu"


def _server(path: Path, sidecar: Sidecar, config: PackageConfig, image: ImageConfig) -> _Server:
    name, version, plan = config.name or path.stem, config.version or 1, sidecar.plan
    require_model_name(name)
    largest = max((profile.max for profile in plan.profiles), default=LARGEST) if plan else LARGEST
    if plan and (config.max_batch or 0) > largest:
        raise InputError(f"--max-batch {config.max_batch}: the plan accepts at most {largest}")
    arguments = ["--max-batch", str(config.max_batch or largest)]
    arguments += ["--max-wait", f"{config.max_wait_ms:g}ms"]
    if plan is not None:
        if config.device == "cpu":
            raise InputError(f"{path}: a plan runs on a GPU only", fix="package its ONNX file")
        runs_on = plan.builder
        arguments += ["--contexts", str(config.instances)] if config.instances > 1 else []
    else:
        require_single_file(path)
        if config.instances > 1:
            raise InputError(
                f"--instances {config.instances}: the server runs one instance of an ONNX file",
                fix="leave --instances out, and raise --max-replicas",
            )
        runs_on = "gpu" if config.device == "cuda" else "cpu"
        arguments += ["--provider", "cuda"] if runs_on == "gpu" else []
    return _Server(
        file=f"model{path.suffix.lower()}",
        name=name,
        version=version,
        image=image.image or f"{name.lower()}:{version}",
        runs_on=runs_on,
        arguments=tuple(arguments),
        versions=_versions(sidecar, EXTRAS[runs_on]),
    )


def _versions(sidecar: Sidecar, extra: str) -> tuple[str, ...]:
    """Return the versions of this environment's libraries, and of the one that built the plan."""
    versions: dict[str, str] = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("rtresnet") or ():
            of_extra = re.search(r"extra == .([\w-]+)", requirement)
            if of_extra and of_extra[1] not in (extra, "serve"):
                continue
            name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name).partition("+")[0]
    if sidecar.plan is not None:
        versions[hardware.DISTRIBUTIONS[sidecar.plan.builder]] = sidecar.plan.version
    return tuple(f"{name}=={version}" for name, version in sorted(versions.items()))


def dockerfile(server: _Server) -> str:
    """Return the text of the Dockerfile."""
    gpus = " --gpus all" if server.on_gpu else ""
    index = " --extra-index-url https://pypi.nvidia.com" if server.runs_on == "tensorrt" else ""
    requirement = f"rtresnet[{EXTRAS[server.runs_on]},serve]=={__version__}"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    ready = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready')"
    lines = [
        f"# {provenance.made_by()['command']}",
        f"# docker build -t {server.image} .",
        f"# docker run --rm{gpus} -p 8000:8000 -p 8001:8001 {server.image}",
        "# A wheel of rtresnet in this folder is preferred to the package index.",
        f"FROM python:{python}-slim",
        *(["ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
          if server.on_gpu else []),
        "WORKDIR /app",
        "COPY constraints.txt *.whl ./",
        f"RUN pip install --no-cache-dir{index} --find-links . -c constraints.txt "
        f"'{requirement}' \\",
        f"    && useradd --uid {USER} --create-home user",
        "COPY models /models",
        f"USER {USER}",
        "WORKDIR /home/user",
        "EXPOSE 8000 8001",
        f"HEALTHCHECK --start-period=60s CMD {json.dumps(['python', '-c', ready])}",
        f"ENTRYPOINT {json.dumps(['rtresnet', 'serve', '/models', '--host', '0.0.0.0'])}",
        f"CMD {json.dumps(server.arguments)}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def manifest(server: _Server, image: ImageConfig) -> str:
    """Return the text of the InferenceService.

    KEDA divides the metric by the number of replicas (its type AverageValue, which KServe does not
    change), so the query multiplies the mean by that number.
    """
    resource = re.sub(r"[^a-z0-9]+", "-", server.name.lower()).strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,49}", resource):
        raise InputError(
            f"--name {server.name}: Kubernetes needs a name that begins with a letter and has at "
            "most 50 characters",
            fix="choose another --name",
        )
    series = f"rtresnet_queue_seconds_{{}}{{{{model={json.dumps(server.name)}}}}}"
    total, count = series.format("sum"), series.format("count")
    query = (
        f"1000 * sum(rate({total}[1m])) / clamp_min(sum(rate({count}[1m])), 0.001) * count({count})"
    )
    threads = () if server.on_gpu else ("--threads", str(image.cpus))
    return MANIFEST.substitute(
        name=server.image,
        resource=resource,
        min_replicas=image.min_replicas,
        max_replicas=image.max_replicas,
        prometheus=json.dumps(image.prometheus),
        query=json.dumps(query),
        target=f"{image.queue_target_ms:g}",
        termination=GRACE_SECONDS + 15,
        image=json.dumps(server.image),
        arguments=json.dumps([*server.arguments, *threads, "--grace", str(GRACE_SECONDS)]),
        cpus=image.cpus,
        gpu="\n            nvidia.com/gpu: 1" if server.on_gpu else "",
        user=USER,
    )


def _write_folder(folder: Path, path: Path, sidecar: Sidecar, server: _Server) -> None:
    """Write the folder atomically."""
    if folder.exists():
        raise InputError(
            f"{folder}: exists already", fix=f"choose another folder, or: rm -r {folder}"
        )
    with atomic_io.new_folder(folder) as temporary:
        atomic_io.write_text(temporary / "Dockerfile", dockerfile(server))
        atomic_io.write_text(temporary / "constraints.txt", "\n".join(server.versions) + "\n")
        version = temporary / "models" / server.name / str(server.version)
        version.mkdir(parents=True)
        artifacts.publish(
            version / server.file, lambda target: shutil.copyfile(path, target), sidecar
        )
        for file in [version, *version.iterdir()]:  # the image's user reads them
            file.chmod(0o755 if file.is_dir() else 0o644)


def _notes(server: _Server, sidecar: Sidecar, image: ImageConfig, kserve: bool) -> tuple[str, ...]:
    notes = []
    if sidecar.plan is not None:
        targets = ", ".join(sidecar.plan.targets)
        notes.append(
            f"the machine needs a GPU of {targets}" if targets else "the machine needs a GPU"
        )
    elif server.on_gpu:
        notes.append("the machine needs an NVIDIA GPU")
    if kserve and image.image is None:
        notes.append(
            f"the manifest names the image {shlex.quote(server.image)}; choose another name, with "
            "its registry, with --image"
        )
    return tuple(notes)
