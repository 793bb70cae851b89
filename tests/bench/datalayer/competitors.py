"""Who is measured beside us: environments with pinned versions."""

from tests.bench.harness.venvs import Environment

ANNBATCH = Environment(
    name="annbatch",
    packages=("annbatch==0.3.1", "zarrs==0.2.3", "numba", "pyarrow"),
    python=(3, 12),
)
HUGGINGFACE = Environment(name="huggingface", packages=("datasets==5.2.0",))
WEBDATASET = Environment(name="webdataset", packages=("webdataset==1.0.2",))
SCDATASET = Environment(name="scdataset", packages=("scdataset==0.3.0", "anndata", "torch"))
