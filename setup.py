from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hoyer-det",
    version="0.1.0",
    description="Object detection with one-time-step spiking neural networks (Hoyer regulariser) on torchvision",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["backbones", "backbones.*", "detection", "detection.*"]),
    package_data={
        "backbones.zoo": ["*/config.yaml", "*/run.json", "*/metrics.jsonl", "*/*.safetensors"],
        "detection": ["templates/*"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=2",
        "accelerate>=1.10",
        # No longer maintained and its successor under the AGPL: pinned. detection/data/transforms.py alone knows it.
        "albumentations==2.0.8",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "opencv-python-headless>=4.9",
        "pillow>=10",
        "pycocotools>=2.0.8",
        "pydantic>=2.9",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tyro>=1.0",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "fast": ["faster-coco-eval>=1.6"],
        "export": ["nir>=1.0.8", "onnx>=1.17", "onnxruntime>=1.20"],
        "dev": [
            "faster-coco-eval>=1.6",
            "hypothesis",
            "nir>=1.0.8",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tensorboard",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
