"""What the package is and needs. Exact versions are in constraints.txt; `bash launch/test.sh` puts both together."""

from setuptools import find_packages, setup

setup(
    name="moect",
    version="0.1.0",
    description="Teach an LLM new languages without losing what it knows: continual training with appended experts.",
    author="The moect authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["moect", "moect.*"]),
    package_data={
        "moect.dispatch": ["csrc/*"],  # compiled where they are used, as is the next
        "moect.bench": ["*.cpp"],
        "moect.monitor.tasks": ["files/*"],
        "moect.monitor.reporting.page": ["templates/*"],
    },
    install_requires=[
        "backports.zstd>=1.8,<2; python_version < '3.14'",
        "datasets>=5,<6",
        "deepspeed>=0.19,<0.20",
        "jinja2>=3.1,<4",
        "lm-eval>=0.4.13,<0.5",
        "matplotlib>=3.10,<4",
        "num2words>=0.5.14,<0.6",
        "numpy>=2,<3",
        "orjson>=3.11,<4",
        "peft>=0.21,<0.22",
        "pillow>=11,<14",
        "psutil>=7,<8",
        "py3langid>=0.4,<0.5",
        "pyarrow>=21,<27",
        "pydantic>=2.11,<3",
        "pyyaml>=6,<7",
        "regex>=2025.1",
        "rensa>=0.5,<0.6",
        "rich>=14,<16",
        "safetensors>=0.6,<1",
        "tensorboard>=2.20,<3",
        "tokenizers>=0.23,<0.24",
        "torch>=2.11,<3",
        "transformers>=5.17,<6",
        "xxhash>=3.5,<5",
    ],
    extras_require={
        "dev": ["hypothesis>=6.150,<7", "packaging>=25", "pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff>=0.17,<0.18"]
    },
    entry_points={"console_scripts": ["moect=moect.cli:process"]},
)
