"""k8s/ without a cluster: does it render, is it valid, and does everything it names exist?"""

import fnmatch
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cellray.bundle import load as load_bundle
from cellray.data.simulate import simulate
from cellray.data.truth import Simulation
from cellray.train import recipe as recipes
from cellray.train.run import Run

KUBERNETES = "1.33"
"""Version whose schemas the core objects are checked against."""


def load(folder):
    for path in sorted(folder.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            yield from yaml.safe_load_all(path.read_text())


@pytest.fixture(scope="module")
def objects(root):
    return list(load(root / "k8s" / "base"))


@pytest.fixture(scope="module", params=["base", "overlays/example"])
def rendered(request, root):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here to render with")
    command = [kubectl, "kustomize", root / "k8s" / request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def schemas(shared):
    """Kind -> strict JSON schema of KubeRay's own objects."""
    folder = shared / "k8s" / "crds"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with KubeRay's definitions")
    found = {}
    for path in folder.glob("*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        (version,) = [version for version in definition["versions"] if version["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {
            "type": "object"
        }  # an ObjectMeta, which the definition leaves out
        found[definition["names"]["kind"]] = schema
    return found


def strict(node):
    """An OpenAPI schema as a JSON schema that refuses fields it does not know."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    named = {"properties": {name: strict(schema) for name, schema in node.get("properties", {}).items()}}
    plain = {key: strict(value) for key, value in node.items() if key not in ("properties", "format")}
    schema = plain | (named if "properties" in node else {})
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if node.get("type") == "object" and not open_ended:
        schema["additionalProperties"] = False
    if node.get("x-kubernetes-int-or-string"):
        schema = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return {"anyOf": [schema, {"type": "null"}]} if node.get("nullable") else schema


def templates(thing):
    """(where, pod template) of everything that becomes a pod."""
    if isinstance(thing, dict):
        if "containers" in thing.get("spec", {}) and "kind" not in thing:
            yield thing
        for value in thing.values():
            yield from templates(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from templates(value)


def of_kind(objects, kind):
    found = [item for item in objects if item["kind"] == kind]
    assert found
    return found


def settings(objects):
    (found,) = of_kind(objects, "ConfigMap")
    return found["data"]


def entrypoints(objects):
    """Name -> shell command of every job, in the order of a run."""
    found = {job["metadata"]["name"]: job["spec"]["entrypoint"] for job in of_kind(objects, "RayJob")}
    for job in of_kind(objects, "Job"):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        bash, option, found[job["metadata"]["name"]] = container["command"]
        assert (bash, option) == ("bash", "-c")
    return {name: found.pop(name) for name in ("ingest", "pretrain", "export")} | found


def test_it_renders_and_holds_every_object(rendered, objects):
    names = {(item["kind"], item["metadata"]["name"]) for item in objects}
    assert {(item["kind"], item["metadata"]["name"]) for item in rendered} == names
    for item in rendered:
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "cellray"
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "cellray"


def test_core_objects_are_valid(rendered):
    core = [item for item in rendered if not item["apiVersion"].startswith("ray.io/")]
    assert len(core) >= 8
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_ray_objects_are_valid(rendered, schemas):
    ours = [item for item in rendered if item["apiVersion"] == "ray.io/v1"]
    assert {item["kind"] for item in ours} == {"RayJob", "RayService"}
    for item in ours:
        jsonschema.Draft202012Validator(schemas[item["kind"]]).validate(item)


def test_pods_are_valid(rendered):
    pods = list(templates(rendered))
    assert len(pods) == 9
    for template in pods:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}) | {"name": "pod"}}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entrypont", "python"),
        ("spec.suspend", "yes"),
        ("spec.rayClusterSpec.authOptions.mode", "open"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.envfrom", []),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "one"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu", True),
        ("spec.backoffLimit", None),
    ],
)
def test_the_schema_is_strict(path, value, objects, schemas):
    job = yaml.safe_load(yaml.safe_dump(of_kind(objects, "RayJob")[0]))
    *way, last = path.split(".")
    node = job
    for name in way:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[last] = value
    assert list(jsonschema.Draft202012Validator(schemas["RayJob"]).iter_errors(job))


def test_rules_that_the_schema_cannot_say_are_kept(objects):
    for job in of_kind(objects, "RayJob"):
        assert "deletionStrategy" not in job["spec"] or "shutdownAfterJobFinishes" not in job["spec"]
    for cluster in clusters(objects):
        for group in cluster["workerGroupSpecs"]:
            assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def clusters(objects):
    yield from (job["spec"]["rayClusterSpec"] for job in of_kind(objects, "RayJob"))
    yield from (service["spec"]["rayClusterConfig"] for service in of_kind(objects, "RayService"))


def test_clusters_demand_a_token_and_run_the_pinned_ray(objects, root):
    pins = (root / "constraints.txt").read_text().splitlines()
    for cluster in clusters(objects):
        assert cluster["authOptions"]["mode"] == "token"
        assert f"ray=={cluster['rayVersion']}" in pins
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_nothing_costs_money_before_it_is_started(objects):
    started = [item for item in objects if item["kind"] in ("Job", "RayJob", "RayService")]
    assert len(started) == 4
    assert all(item["spec"]["suspend"] is True for item in started)


def test_pods_have_no_rights_they_do_not_need(objects):
    for template in templates(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"])
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} == set(container["resources"]["limits"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= {
                v["name"] for v in spec["volumes"]
            }


def test_every_ray_cluster_has_its_network_policy(objects):
    policies = {item["metadata"]["name"]: item["spec"] for item in of_kind(objects, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    key = "app.kubernetes.io/component"
    for template in templates([item for item in objects if item["apiVersion"] == "ray.io/v1"]):
        component = template["metadata"]["labels"][key]
        assert policies[component]["podSelector"]["matchLabels"] == {key: component}
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"][key] in policies


def test_settings_and_secrets_are_referenced_and_no_secret_is_contained(objects, root):
    assert not [item for item in objects if item["kind"] == "Secret"]
    (config,) = of_kind(objects, "ConfigMap")
    for template in templates(objects):
        for container in template["spec"]["containers"]:
            references = container["envFrom"]
            assert {"configMapRef": {"name": config["metadata"]["name"]}} in references
            assert references[1:] in ([], [{"secretRef": {"name": "cellray-storage"}}])
            assert all(set(variable) == {"name", "value"} for variable in container.get("env", []))
    assert "cellray-storage" in (root / "k8s" / "README.md").read_text()


def test_entrypoints_name_commands_and_settings_that_exist(objects):
    data = settings(objects)
    recipe = recipes.load(data["CELLRAY_RECIPE"])
    for entrypoint in entrypoints(objects).values():
        assert set(re.findall(r"\$(\w+)", entrypoint)) <= set(data)
        filled = re.sub(r"\$(\w+)", lambda match: data[match[1]], entrypoint)
        python, option, module, path, *rest = shlex.split(filled)
        assert (python, option) == ("python", "-m")
        assert importlib.util.find_spec(module)
        assert path == data["CELLRAY_RECIPE"]
        changes = [word for word in rest if not word.startswith("--")]
        assert recipes.override(recipe, recipes.settings(changes)).run == data["CELLRAY_RUN"]


def test_the_serve_configuration_is_valid(objects):
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind(objects, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    parsed = ServeDeploySchema(**config).model_dump()
    assert not unknown(config, parsed)
    assert unknown(config | {"http_option": {}}, parsed) == ["http_option"]
    port = config["http_options"]["port"]
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": port} in worker["ports"]


def unknown(given, known):
    """Dotted names in `given` that a parsed configuration does not have. What users define is left out."""
    found = []
    for name, value in given.items():
        if name not in known:
            found.append(name)
        elif name not in ("args", "user_config", "runtime_env", "ray_actor_options"):
            pairs = [(value, known[name])]
            if isinstance(value, list):
                pairs = list(zip(value, known[name], strict=True))
            found += [f"{name}.{odd}" for a, b in pairs if isinstance(a, dict) for odd in unknown(a, b)]
    return found


def test_the_serve_application_exists_and_takes_these_settings(objects, monkeypatch):
    (service,) = of_kind(objects, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    app = importlib.import_module(module)
    assert callable(getattr(app, name))
    monkeypatch.setenv("CELLRAY_BUNDLE", settings(objects)["CELLRAY_BUNDLE"])
    parsed = app.parse({key: str(value) for key, value in application["args"].items()})
    assert parsed.bundle == settings(objects)["CELLRAY_BUNDLE"]


def test_the_image_holds_what_it_copies_and_runs_as_nobody(root):
    lines = (root / "k8s" / "Dockerfile").read_text().splitlines()
    copies = [shlex.split(line)[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    ignore = (root / ".dockerignore").read_text().splitlines()
    kept = [rule[1:] for rule in ignore if rule.startswith("!")]
    assert "*" in ignore
    for source in [source for sources in copies for source in sources]:
        assert (root / source.removeprefix("./")).exists()
        assert any(fnmatch.fnmatch(source.removeprefix("./"), rule) for rule in kept), source
    assert {"pipelines", "serve", "tune", "platform", "constraints.txt"} <= {s for c in copies for s in c}
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    assert all(re.match(r"FROM \S+:\d\S+", line) for line in lines if line.startswith("FROM "))


def test_all_pods_run_one_image(objects, rendered):
    images = {container["image"] for t in templates(objects) for container in t["spec"]["containers"]}
    assert images == {f"cellray:{importlib.import_module('cellray').__version__}"}
    assert (
        len({container["image"] for t in templates(rendered) for container in t["spec"]["containers"]}) == 1
    )


def test_every_entrypoint_runs_as_it_stands(objects, root, tmp_path):
    atlas = simulate(
        tmp_path / "atlas", Simulation(cells=240, genes=60, peaks=80, proteins=6, types=3, donors=3)
    )
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= settings(objects) | {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)]),
        "CELLRAY_RECIPE": "pipelines.recipes.tiny:recipe",
        "CELLRAY_ATLAS": str(atlas),
        "CELLRAY_RUN": str(tmp_path / "run"),
    }
    for name, entrypoint in entrypoints(objects).items():
        done = subprocess.run(
            ["bash", "-c", entrypoint],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    assert load_bundle(str(tmp_path / "run" / "bundle"))
    run = Run(recipes.from_json(json.loads((tmp_path / "run" / "recipe.json").read_text())))
    assert 0 < len(run.store) <= 240
    assert {"joint", "distil"} <= {stage.name for stage in (tmp_path / "run" / "stages").iterdir()}
