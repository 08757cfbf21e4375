"""The project's one list of dependencies.

Each lower bound is the oldest version with which the tests passed (Python 3.10, torch 2.6); of the
development tools, some are simply recent.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "evolving_attention/__init__.py").read_text(encoding="utf-8")
).group(1)

# fairseq 0.12.2 neither builds with current pip nor imports on Python 3.11. Two packages have its
# main branch, repaired and with the same import name: ve-fairseq as wheels for some platforms, and
# fairseq-fixed as source, which needs a C++ compiler and four minutes.
HAS_WHEEL = (
    "(python_version == '3.11' or python_version == '3.12')"
    " and sys_platform == 'linux' and platform_machine == 'x86_64'"
)
HAS_NO_WHEEL = (
    "(python_version < '3.11' or python_version > '3.12')"
    " or sys_platform != 'linux' or platform_machine != 'x86_64'"
)

EXTRAS = {
    "fairseq": [
        f"ve-fairseq>=0.12.3; {HAS_WHEEL}",
        f"fairseq-fixed>=0.12.3.1; {HAS_NO_WHEEL}",
        "sacremoses>=0.1.0",
        "subword-nmt>=0.3.7",
        "sacrebleu>=2.3.1",
        "tqdm>=4.65",
    ],
    "timm": ["timm>=1.0.31"],
    # transformers 5 needs Python 3.11; on an older one, this extra installs nothing of it.
    "transformers": [
        "transformers>=5.24; python_version >= '3.11'",
        "accelerate>=1.15; python_version >= '3.11'",
    ],
    "timeseries": ["aeon>=1.0.0", "skorch>=1.1.0"],
    "glue": ["tokenizers>=0.15.0", "scikit-learn>=1.3.0"],
    "viz": ["matplotlib>=3.8.4", "scipy>=1.13.0"],
    "demo": ["num2words>=0.5.12", "babel>=2.12.1", "scikit-learn>=1.3.0"],
    "dev": [
        "pytest>=7.4.0",
        "pytest-timeout>=2.1.0",
        "pytest-xdist>=3.3.1",
        "expecttest>=0.1.6",
        "hypothesis>=6.82.0",
        "ipykernel>=6.29.0",
        "mypy>=2.4",
        "nbclient>=0.11.0",
        "onnx>=1.23.2",
        "onnxruntime>=1.32.0",
        "onnxscript>=0.7.2",
        "playwright>=1.65.2",
        "peft>=0.21.2",
        "ruff>=0.17.5",
    ],
}

setup(
    name="evolving-attention",
    version=VERSION,
    description="Attention maps that evolve through the layers of a transformer",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    project_urls={
        "Paper (ICML 2021)": "https://arxiv.org/abs/2102.12895",
        "Paper (TPAMI 2023)": "https://arxiv.org/abs/2212.08330",
    },
    keywords=["attention", "transformer", "fairseq", "timm", "transformers", "pytorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(
        include=[
            "evolving_attention*",
            "ea_fairseq*",
            "ea_timm*",
            "ea_transformers*",
            "ea_aeon*",
            "ea_maps*",
        ]
    ),
    package_data={"evolving_attention": ["py.typed"], "ea_maps": ["page.html"]},
    # From torch 2.6 on, torch.load runs no code that a checkpoint carries.
    install_requires=["torch>=2.6"],
    extras_require=EXTRAS,
)
