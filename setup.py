"""Package metadata. Tool settings (ruff, pyright, pytest) stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "dpo_jax" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

# Lower bounds: the oldest version whose interface the code uses. Upper bounds only where a newer major version is
# known or announced to move that interface:
#   jax          its 0.x minors remove what they deprecated, so each new one is tried before it is let in;
#   transformers 6 may move tokenizers and chat templates again, as 5 did.
INSTALL = [
    "jax>=0.10,<0.13",
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "chex>=0.1.91",
    "numpy>=2.0",
    "ml_dtypes>=0.5",
    "grain>=0.2.15",
    "tensorflow-datasets>=4.9.9",
    "array_record>=0.8",
    "etils>=1.12",
    "pyarrow>=18",
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    "sentencepiece>=0.2",
    "protobuf>=6.33",
    "jinja2>=3.1",
    "huggingface_hub>=1.0",
    "httpx>=0.27",
    "pyyaml>=6",
    "starlette>=0.40",
    "uvicorn>=0.30",
    "safetensors>=0.6",
    "gguf>=0.17",
    "rich>=14",
    "tensorboardX>=2.6",
    "matplotlib>=3.9",
    "scikit-learn>=1.9",
    "vaderSentiment>=3.3.2",
    "py3langid>=0.4",  # older versions unpickle their model
]

MATH = ["math-verify[antlr4_13_2]>=0.8"]  # --reward math:COLUMN; dpo-jax recipe iterative_rpo --match math_verify
WANDB = ["wandb>=0.18"]  # --log.wandb PROJECT
JSON = ["jsonschema>=4.18"]  # --reward json:SCHEMA
LM_EVAL = ["lm-eval>=0.4.13,<0.5"]  # dpo-jax lm-eval
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]

setup(
    name="dpo_jax",
    version=VERSION[1],
    description="Preference training of Llama models in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The recipes of configs/ lie in a wheel as dpo_jax/configs, where `dpo_jax.config.derive` finds them.
    packages=[*find_packages(include=["dpo_jax", "dpo_jax.*"]), "dpo_jax.configs"],
    package_dir={"dpo_jax.configs": "configs"},
    package_data={
        "dpo_jax": [
            "py.typed",
            "complete/prompts/*.json",
            "judge/asked/prompts/*.json",
            "judge/rewards/*.json",
            "data/rows/phrases/*.json",
        ]
    },
    python_requires=">=3.11",
    install_requires=INSTALL,
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda12": ["jax[cuda12]>=0.10,<0.13"],
        "cuda13": ["jax[cuda13]>=0.10,<0.13"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],  # `mkdocs serve` shows docs/ as a site
        "math": MATH,
        "json": JSON,
        "lm_eval": LM_EVAL,
        "wandb": WANDB,
        "notebook": [*NOTEBOOK, "jupyterlab>=4"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            "pyright>=1.1.400",
            # PyTorch and PEFT are the other side of the parity tests; nothing in the package imports them.
            "torch==2.13.0",
            "peft>=0.17",
            # libtpu compiles for TPU slices that are not here; it has wheels for this platform only.
            "jax[tpu]>=0.10,<0.13; sys_platform == 'linux' and platform_machine == 'x86_64'",
            *NOTEBOOK,
            *MATH,
            *JSON,
            "openai>=1.50",  # asks the endpoint of dpo-jax serve
        ],
    },
    entry_points={"console_scripts": ["dpo-jax = dpo_jax.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
