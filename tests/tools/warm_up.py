"""What the process that commands are forked from (`end_to_end_tools.start`) does once, so that none of them has to.

To import it imports every module of the product, composes both programs' configs (the parsers of Hydra and OmegaConf are slow
at first), and draws a plot (matplotlib looks for its fonts).
"""

import gc
import importlib
import io
import pkgutil
from pathlib import Path

import read_once  # noqa: F401
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stillhouse", "datamodules", "lightning_modules", "callbacks", "launch")
LIBRARIES = ("pytest", "torch.utils.tensorboard", "sklearn.datasets")


def import_all() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            importlib.import_module(module.name)


def compose_configs() -> None:
    importlib.import_module("launch.run.names").register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name in ("config", "evaluate"):
            compose(name, ["+words='a b'", "+numbers=[1,2.5e-3,{none:null}]"])
    GlobalHydra.instance().clear()


def draw_plot() -> None:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([1, 10], [1, 10], label="line")
    axes.set(yscale="log", title="title", xlabel="kimg")
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")


import_all()
compose_configs()
draw_plot()
gc.collect()
gc.freeze()  # forked processes neither search these objects nor, by searching, copy their memory
