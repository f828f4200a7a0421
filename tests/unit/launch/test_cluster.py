"""A cluster's file: layers, types, what sbatch is not asked twice, and the environment of its ranks."""

import getpass
import mmap
from pathlib import Path

import pytest
import torch
from tiny import write_recipe

from framework.environment import rank_variables
from framework.launch.cluster import load_cluster
from framework.launch.config import OWN_OPTIONS, ClusterConfig, HealthConfig, LinkConfig, time_seconds
from framework.launch.variables import rank_environment
from framework.recipe import load_recipe

CLUSTERS = Path(__file__).parents[3] / "slurm" / "clusters"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path, *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_cluster(path, words)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_of_the_repository_loads(path: Path) -> None:
    assert load_cluster(path).name == path.stem


def test_plain_is_what_it_says() -> None:
    plain = load_cluster(CLUSTERS / "plain.yaml")
    assert (plain.ranks_per_node, plain.gpus, plain.gpus_per_node, plain.time) == (8, True, "8", "24:00:00")
    assert plain.sbatch == {"partition": "gpu", "exclusive": "", "mem": "0"}
    assert plain.links == LinkConfig(domain=8, link=450.0, network=50.0)
    assert plain.health == HealthConfig("full", disk=50.0)


def test_containers_is_plain_and_more() -> None:
    """The name that differs drops no section of the base, as it would in a recipe's alternatives."""
    plain, containers = load_cluster(CLUSTERS / "plain.yaml"), load_cluster(CLUSTERS / "containers.yaml")
    assert containers.sbatch == plain.sbatch and containers.links == plain.links
    assert containers.environment.items() > plain.environment.items()
    assert containers.srun[0].startswith("--container-image=") and plain.srun == []


def test_the_lab_has_no_gpus() -> None:
    lab = load_cluster(CLUSTERS / "lab.yaml")
    assert (lab.gpus, lab.gpus_per_node, lab.ranks_per_node, lab.cpus_per_rank) == (False, None, 2, 2)
    assert lab.health.level == "basic" and lab.links.domain == 2


def test_layers_lie_over_each_other_and_words_on_top(tmp_path: Path) -> None:
    write(tmp_path / "site.yaml", "name: site\nsbatch: {partition: gpu, exclusive: true}\nrequeues: 1\nspare_nodes: 1")
    top = write(tmp_path / "mine.yaml", "base: site.yaml\nname: mine\nsbatch: {account: me, exclusive: false}")
    found = load_cluster(top, ["spare_nodes=2", "health.level=off", "environment.A=${HOME}", "name=other"])
    assert found.sbatch == {"partition": "gpu", "account": "me"}
    assert (found.name, found.requeues, found.spare_nodes, found.health.level) == ("other", 1, 2, "off")
    assert found.environment == {"A": "${HOME}"}


def test_a_file_without_a_name_has_its_own(tmp_path: Path) -> None:
    assert load_cluster(write(tmp_path / "west.yaml", "time: 1-12")).name == "west"


def test_words_stay_words(tmp_path: Path) -> None:
    """YAML 1.1 reads 24:00:00 as 86400, off as false and a date as one; OmegaConf reads ${X} as a key of its own."""
    text = 'time: 24:00:00\nsetup: ["export A=${B:-c} \\\\${D}"]\nhealth: {level: off}\nsbatch: {begin: 2030-01-01}'
    found = load_cluster(write(tmp_path / "c.yaml", text))
    assert (found.time, found.health.level) == ("24:00:00", "off")
    assert found.setup == [r"export A=${B:-c} \${D}"] and found.sbatch == {"begin": "2030-01-01"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ranks_per_nod: 8", ["ranks_per_nod=8", "'ranks_per_node'"]),
        ("health: {clok: 1}", ["health.clok=1", "'clock'"]),
        ("links: {domian: 8}", ["links.domian=8", "'domain'"]),
        ("cpus_per_rank: many", ["cpus_per_rank=many", "Integer"]),
        ("srun: --container-image=x", ["srun=--container-image=x", "list"]),
        ("sbatch: [partition]", ["sbatch"]),
        ("health: {level: all}", ["health.level=all", "basic"]),
        ("environment: {NCCL_X: true}", ["environment.NCCL_X=True", "quotes"]),
        ("ranks_per_node: 0", ["ranks_per_node=0 must be at least 1"]),
        ("spare_nodes: -1", ["spare_nodes=-1 must be at least 0"]),
        ("name: a/b", ["name='a/b'"]),
        ("time: tomorrow", ["time='tomorrow'", "24:00:00"]),
        ("time: 00:02:00", ["notice=180 s must be below time=00:02:00 (120 s)"]),
        ("gpus: false\ngpu_type: h100", ["gpu_type='h100' with gpus=false"]),
        ("links: {domain: 12}", ["links.domain=12", "ranks_per_node=8"]),
        ("links: {network: 0}", ["links.network=0.0 must be above 0"]),
    ],
)
def test_a_mistake_is_refused_by_its_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refused(write(tmp_path / "c.yaml", text))
    assert all(part in message for part in [*parts, "c.yaml"]) and "\n" not in message


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("nodes", "--nodes"),
        ("ntasks-per-node", "ranks_per_node"),
        ("time", "time"),
        ("signal", "notice"),
        ("requeue", "requeues"),
        ("output", "the run directory"),
        ("job-name", "the run's name"),
        ("dependency", "--after"),
        ("array", "--array"),
        ("exclude", "health"),
        ("no-kill", "spare_nodes"),
        ("gpus-per-node", "gpu_type"),
        ("cpus_per_task", "cpus_per_rank"),
    ],
)
def test_what_we_ask_of_sbatch_is_refused_with_its_key(option: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"sbatch\.{option} is set by .*{key}"):
        ClusterConfig("c", sbatch={option: "1"})
    assert option.replace("_", "-") in OWN_OPTIONS


@pytest.mark.parametrize(
    ("option", "fix"), [("p", "its long name"), ("--partition", "partition"), ("mem_bind", "mem-b")]
)
def test_options_are_spelt_as_sbatch_does(option: str, fix: str) -> None:
    with pytest.raises(ValueError, match=f"write {fix}"):
        ClusterConfig("c", sbatch={option: "x"})


def test_gpus_are_asked_for_once() -> None:
    assert ClusterConfig("c", ranks_per_node=4, gpu_type="h100").gpus_per_node == "h100:4"
    assert ClusterConfig("c", sbatch={"gres": "gpu:8"}).gpus_per_node is None
    assert ClusterConfig("c", sbatch={"gres": "nvme:1"}).gpus_per_node == "8"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("2:00:30", 7230), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_times_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds
    assert time_seconds("UNLIMITED") == float("inf")


def test_a_recipe_given_as_cluster_is_told_apart(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "latents")
    message = refused(recipe)
    assert "tiny.yaml is a recipe (it sets run, mesh, tokenizer)" in message and "slurm/clusters/" in message
    heir = write(tmp_path / "heir.yaml", f"base: {recipe}\nseed: 3")
    assert "is a recipe (it sets seed)" in refused(heir)


def test_a_cluster_given_as_recipe_is_told_apart() -> None:
    with pytest.raises(ValueError, match=r"plain\.yaml describes a cluster \(name, ranks_per_node, gpus\).*--cluster"):
        load_recipe(CLUSTERS / "plain.yaml", [])


def test_one_wrong_key_makes_no_recipe_of_a_cluster(tmp_path: Path) -> None:
    assert "run=x" in refused(write(tmp_path / "c.yaml", "gpus: false\nrun: x"))


def test_a_file_that_is_not_there_is_a_cluster(tmp_path: Path) -> None:
    assert "no such cluster" in refused(write(tmp_path / "heir.yaml", "base: gone.yaml"))
    assert "no such cluster" in refused(CLUSTERS / "plan.yaml") and "plain.yaml?" in refused(CLUSTERS / "plan.yaml")


def test_ranks_have_caches_of_their_user_on_the_nodes_disk() -> None:
    found = rank_environment(ClusterConfig("c", scratch="/local", cpus_per_rank=12), "ann")
    assert found["TRITON_CACHE_DIR"] == "/local/cuboid-ann/triton"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/local/cuboid-ann/inductor"
    assert found["TORCH_EXTENSIONS_DIR"] == "/local/cuboid-ann/extensions"
    assert found["OMP_NUM_THREADS"] == "12" and "DS_ACCELERATOR" not in found
    assert "TORCH_FR_DUMP_TEMP_FILE" not in found


def test_collectives_that_hang_are_dumped_into_the_attempt(tmp_path: Path) -> None:
    found = rank_environment(ClusterConfig("c"), "ann", attempt=tmp_path)
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/logs/collectives-"
    assert (found["TORCH_FR_BUFFER_SIZE"], found["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("2000", "1")
    cpu = rank_environment(ClusterConfig("c", gpus=False), "ann", attempt=tmp_path)
    assert cpu["DS_ACCELERATOR"] == "cpu" and "TORCH_FR_DUMP_TEMP_FILE" not in cpu


def test_the_clusters_own_variables_win() -> None:
    cluster = ClusterConfig("c", environment={"OMP_NUM_THREADS": "3", "NCCL_IB_HCA": "mlx5"})
    found = rank_environment(cluster, getpass.getuser())
    assert (found["OMP_NUM_THREADS"], found["NCCL_IB_HCA"]) == ("3", "mlx5")


def test_local_ranks_get_the_same_defaults(tmp_path: Path) -> None:
    local = rank_variables(rank=0, world_size=1, port=1, failures=tmp_path)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM"):
        assert name in local and name in rank_environment(ClusterConfig("c"), "ann")


def test_torch_reads_the_names() -> None:
    """In its own library and headers: a name that torch doesn't know would be ignored in silence."""
    folder = Path(torch.__file__).parent
    header = (folder / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_text()
    assert '"TORCH_NCCL_ASYNC_ERROR_HANDLING"' in header and '"TORCH_NCCL_DUMP_ON_TIMEOUT"' in header
    with (folder / "lib/libtorch_cpu.so").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_FR_BUFFER_SIZE"):
                assert library.find(name.encode() + b"\0") >= 0, name
