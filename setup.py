"""Package metadata. `constraints.txt` pins what was tested; the ranges here are what the code needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fast_diffusers" / "__init__.py").read_text(), re.M).group(1)

# ppdiffusers 0.29.0 and paddlenlp 2.8.1 are the last releases that work together on Paddle 3; they accept, but do not
# import with, the newer major versions excluded here.
ECOSYSTEM = [
    "paddlepaddle==3.3.1",
    "ppdiffusers==0.29.0",
    "paddlenlp==2.8.1",
    "aistudio-sdk<0.3",
    "datasets<4",
    "huggingface_hub<0.26",
    "numpy>=1.26,<2",
    "opencv-python<5",
    "pandas<3",
    "pyarrow<20",
]

OWN = [
    "matplotlib>=3.8",
    "packaging>=23",
    "pillow>=10",
    "pyyaml>=6",
    "safetensors>=0.6",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
    "tqdm>=4.65",
    "visualdl>=2.5",
]

setup(
    name="fast-diffusers",
    version=VERSION,
    description="Few-step image diffusion on PaddlePaddle: distillation, sampling, deployment",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["fast_diffusers*", "distill*", "cinn_infer*"]),
    package_data={"fast_diffusers": ["assets/**/*"], "distill": ["assets/**/*", "recipes/*.yaml"]},
    install_requires=ECOSYSTEM + OWN,
    extras_require={
        # Installs over the CPU wheel (both provide `paddle`); README.md, "GPU", says how to leave only one.
        "gpu": ["paddlepaddle-gpu==3.3.1"],
        "export": ["paddle2onnx==2.1.0", "onnxruntime>=1.20,<2", "openvino>=2025.0", "nncf>=2.16"],
        "dev": ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12"],
    },
    entry_points={"console_scripts": ["fast-diffusers = fast_diffusers.cli:main"]},
)
