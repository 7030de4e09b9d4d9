"""The types of all options: what is refused, in which words, and that conf/ itself is not."""

import copy
from functools import cache

import pytest
from end_to_end_tools import ROOT
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launch.evaluate import teacher
from launch.option_types import check_targets
from launch.options import check_options, check_run
from launch.run.build import build
from launch.run.names import register_resolvers


@cache
def composed(choices, program="config"):
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(program, overrides=choices.split())


def changed(choices, *options, program="config"):
    """The program's config of the `choices` with `options` as Hydra reads them."""
    config = copy.deepcopy(composed(choices, program))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(options)), config)
    return config


TRUTH, WHOLE, NUMBER, TEXT = "say true or false", "give a whole number", "give a finite number", "give text"
STUDENT = "method=denoising_student"
CURVES = "method=bezier"

ROWS = {
    STUDENT: [
        # Hydra's texts that Python takes for true
        ("data.conditional=no", f"data.conditional=no: {TRUTH}"),
        ("data.conditional=5", f"data.conditional=5: {TRUTH}"),
        ("teacher.conditional=off", f"teacher.conditional=off: {TRUTH}"),
        ("+data.flip=yes", f"data.flip=yes: {TRUTH}"),
        ("plan=no", f"plan=no: {TRUTH}"),
        ("download=maybe", f"download=maybe: {TRUTH}"),
        ("trainer.channels_last=maybe", "trainer.channels_last=maybe: give true or false or auto"),
        ("+trainer.deterministic=maybe", "trainer.deterministic=maybe: give true or false, warn or null"),
        # numbers
        ("method.kimg=true", f"method.kimg=true: {NUMBER}"),
        ("method.lr=true", f"method.lr=true: {NUMBER}"),
        ("method.lr=fast", f"method.lr=fast: {NUMBER}"),
        ("method.lr=inf", f"method.lr=inf: {NUMBER}"),
        ("method.kimg=inf", f"method.kimg=inf: {NUMBER}"),
        ("method.warmup_kimg=nan", f"method.warmup_kimg=nan: {NUMBER}"),
        ("method.target_noise=some", f"method.target_noise=some: {NUMBER}"),
        ("method.pairs=many", f"method.pairs=many: {WHOLE}"),
        ("method.pairs=1e3", f"method.pairs=1000.0: {WHOLE}"),
        ("callbacks.checkpoints.every_n_steps=2.5", f"callbacks.checkpoints.every_n_steps=2.5: {WHOLE}"),
        ("callbacks.guard.every_n_steps=null", f"callbacks.guard.every_n_steps=null: {WHOLE}"),
        ("evaluation.num_samples=x", f"evaluation.num_samples=x: {WHOLE}"),
        ("evaluation.batch_size=true", f"evaluation.batch_size=true: {WHOLE}"),
        ("evaluation.training.every_kimg=null", f"evaluation.training.every_kimg=null: {NUMBER}"),
        ("batch_size=abc", f"batch_size=abc: {WHOLE}"),
        ("batch_size=16.5", f"batch_size=16.5: {WHOLE}"),
        ("seed=null", f"seed=null: {WHOLE}"),
        ("seed=true", f"seed=true: {WHOLE}"),
        ("trainer.num_nodes=x", f"trainer.num_nodes=x: {WHOLE}"),
        ("trainer.gradient_clip_val=inf", f"trainer.gradient_clip_val=inf: {NUMBER} or null"),
        ("trainer.micro_batch=none", f"trainer.micro_batch=none: {WHOLE}, auto or null"),
        ("teacher.steps=2.0", f"teacher.steps=2.0: {WHOLE}"),
        ("teacher.schedule.rho=seven", f"teacher.schedule.rho=seven: {NUMBER}"),
        ("teacher.preconditioning.sigma_data=nan", f"teacher.preconditioning.sigma_data=nan: {NUMBER}"),
        (
            "+teacher.solver_options.s_churn=yes",
            "teacher.solver_options.s_churn=yes: give true or false, ",
        ),
        # texts
        ("name=2024", f"name=2024: {TEXT}, here in quotes of its own: \"'2024'\""),
        ("name=null", f"name=null: {TEXT}"),
        ("teacher.name=null", f"teacher.name=null: {TEXT}"),
        ("method.store=null", f"method.store=null: {TEXT}"),
        ("trainer.precision=12", "trainer.precision=12: give one of 32-true, tf32, bf16-mixed, 16-mixed"),
        ("trainer.profile=yes", "trainer.profile=yes: give one of simple, advanced, torch or null"),
        (
            "name=../../outside",
            "name='../../outside' must name a folder, or one in others (a/b), below runs/, not empty",
        ),
        # lists and dicts
        ("method.betas=[0.9]", "method.betas=[0.9]: give a list of 2 finite numbers"),
        ("method.betas=[0.9,inf]", "method.betas=[0.9,inf]: give a list of 2 finite numbers"),
        ("method.betas=null", "method.betas=null: give a list of 2 finite numbers"),
        ("teacher.network.channel_mult=[1,x]", "teacher.network.channel_mult=[1,x]: give a list of whole numbers"),
        ("teacher.network.channel_mult=3", "teacher.network.channel_mult=3: give a list of whole numbers"),
        ("evaluation.metrics=5", "evaluation.metrics=5: give a list of texts, text or null"),
        ("callbacks.ema.averages=[{decay:x}]", f"callbacks.ema.averages[0].decay=x: {NUMBER}"),
        ("evaluation.training=null", "evaluation.training=null: give {every_kimg: ..., num_samples: ..., nfe: ...}"),
        # what is built
        ("evaluation.extractor=5", "evaluation.extractor=5: give a config of type FeatureExtractor"),
        ("teacher.network=5", "teacher.network=5: give a config of type Module"),
        ("teacher.schedule=null", "teacher.schedule=null: give a config of type Callable"),
        ("callbacks.ema=5", "callbacks.ema=5: give a config of type Callback"),
        ("+callbacks.foo=1", "callbacks.foo=1: give a config of type Callback"),
        ("+logger.foo=1", "logger.foo=1: give a config of type Logger"),
        # without which nothing of the run would be left
        (
            "callbacks.checkpoints=null",
            "callbacks.checkpoints=null would lose the training, since a checkpoint is what is",
        ),
        ("~callbacks", "callbacks is missing: train.py needs it"),
        # unknown
        ("+batchsize=7", "batchsize is unknown: did you mean batch_size?"),
        ("+foo={a:1}", "foo is unknown: train.py takes name, "),
        ("+method.foo=1", "method.foo is unknown: DenoisingStudent takes "),
        ("+method.wieght_decay=1", "method.wieght_decay is unknown: did you mean weight_decay?"),
        ("+teacher.network.foo=1", "teacher.network.foo is unknown: SongUNet takes resolution, "),
        ("+trainer.foo=1", "trainer.foo is unknown: trainer takes accelerator, "),
        ("+evaluation.foo=1", "evaluation.foo is unknown: evaluation takes extractor, "),
        (
            "+evaluation.training.foo=1",
            "evaluation.training.foo is unknown: evaluation.training takes every_kimg, num_samples, nfe",
        ),
        ("+callbacks.curves.foo=1", "callbacks.curves.foo is unknown: Curves takes no options"),
        ("+logger.tensorboard.foo=1", "logger.tensorboard.foo is unknown: TensorBoard takes "),
        ("+data._args_=[1]", "data._args_ is unknown: "),
        # not to be built
        ("method._target_=shutil.copy", "method._target_=shutil.copy is not built: "),
        ("data._target_=os.system", "data._target_=os.system is not built: "),
        (
            "evaluation.extractor._target_=pathlib.Path.touch",
            "evaluation.extractor._target_=pathlib.Path.touch is not built: ",
        ),
        (
            "teacher.schedule._target_=networks.save_weights",
            "teacher.schedule._target_=networks.save_weights is not built: ",
        ),
        (
            "method._target_=callbacks.checkpoint.os.remove",
            "method._target_=callbacks.checkpoint.os.remove does not exist",
        ),
        ("method._target_=stillhouse.files.os.remove", "method._target_=stillhouse.files.os.remove does not exist"),
        (
            "method._target_=stillhouse.files.Path",
            "method._target_=stillhouse.files.Path is not built: it is no class of ",
        ),
        ("method._target_=stillhouse.files.write_file", "method._target_=stillhouse.files.write_file is not built: "),
        ("method._target_=lightning_modules.Foo", "method._target_=lightning_modules.Foo does not exist"),
        ("+callbacks.foo={_target_:subprocess.run}", "callbacks.foo._target_=subprocess.run is not built: "),
        ("+choices={a:{_target_:os.system}}", "choices.a._target_=os.system is not built: "),
    ],
    f"{CURVES} method.teachers=[]": [
        ("method.teachers=null", "method.teachers=null: give a list of configs of type Teacher"),
        ("method.order=two", f"method.order=two: {WHOLE}"),
        ("method.shuffled=no", f"method.shuffled=no: {TRUTH}"),
        ("method.shared=off", f"method.shared=off: {TRUTH}"),
        ("method.slot=3", "method.slot=3: give text or a list of texts"),
        ("method.slot=null", "method.slot=null: give text or a list of texts"),
        ("method.weights=1", "method.weights=1: give a list of lists of finite numbers or null"),
        (
            "method.drift_times=uniform",
            "method.drift_times=uniform: give a config of type Start or Uniform or UShaped ",
        ),
        ("method.prediction_times=null", "method.prediction_times=null: give a config of type Start "),
    ],
    "method=diff_instruct": [
        ("method.sigma_init=big", f"method.sigma_init=big: {NUMBER}"),
        ("method.two_sided=no", f"method.two_sided=no: {TRUTH}"),
        ("method.gan={generator:1}", "method.gan.fake is missing: method.gan needs it"),
        (
            "method.gan={generator:1,fake:1,sigmas:5}",
            "method.gan.sigmas=5: give a config of type LogNormal or KarrasGrid",
        ),
        ("noise_levels.log_normal.std=inf", f"noise_levels.log_normal.std=inf: {NUMBER}"),
    ],
    "method=disback": [
        ("method.degradation.steps=x", f"method.degradation.steps=x: {WHOLE}"),
        ("~method.degradation.seed", "method.degradation.seed is missing: method.degradation needs it"),
        ("+method.degradation.foo=1", "method.degradation.foo is unknown: method.degradation takes steps, "),
    ],
    "method=sfd": [
        ("method.afs=no", f"method.afs=no: {TRUTH}"),
        ("method.teacher_afs=yes", f"method.teacher_afs=yes: {TRUTH}"),
        ("method.steps=few", "method.steps=few: give a whole number or a list of whole numbers"),
        ("method.steps=null", "method.steps=null: give a whole number or a list of whole numbers"),
        (
            "method.solver_options.threshold=inf",
            "method.solver_options.threshold=inf: give true or ",
        ),
    ],
    "method=progressive": [("method.clip=no", f"method.clip=no: {TRUTH}")],
    "method=b_dense": [
        ("method.branch_weights=5", "method.branch_weights=5: give text or a list of finite numbers"),
        ("method.branch_weights=[a,1,1,1]", "method.branch_weights=[a,1,1,1]: give text or a list of finite numbers"),
        ("method.branch_auxiliary=much", f"method.branch_auxiliary=much: {NUMBER} or null"),
    ],
    f"{STUDENT} logger=wandb": [
        ("logger.wandb.offline=no", f"logger.wandb.offline=no: {TRUTH}"),
        ("logger.wandb.log_model=all", f"logger.wandb.log_model=all: {TRUTH}"),
        ("logger.wandb.tags=paper", "logger.wandb.tags=paper: give a list of texts"),
        ("logger.wandb.group=3", f"logger.wandb.group=3: {TEXT} or null, here in quotes of its own: \"'3'\""),
        ("+logger.wandb.mode=disabled", "logger.wandb.mode is unknown: "),
    ],
    "method=pretrain": [("method.augment=true", f"method.augment=true: {NUMBER} or null")],
    "method=pretrain data=image_folder data.path=pictures": [
        ("data.path=2024", f"data.path=2024: {TEXT}, here in quotes of its own: \"'2024'\""),
        ("data.name=null", f"data.name=null: {TEXT}"),
        ("+data.num_workers=2.5", f"data.num_workers=2.5: {WHOLE}"),
        ("evaluation.extractor.precision=32", f"evaluation.extractor.precision=32: {TEXT}, here in quotes"),
    ],
}


@pytest.mark.parametrize(
    ("choices", "option", "message"), [(choices, *row) for choices, rows in ROWS.items() for row in rows]
)
def test_what_is_refused(choices, option, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        check_run(changed(choices, option))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seed=true", f"seed=true: {WHOLE}"),
        ("device=0", f"device=0: {TEXT}"),
        ("+teacher.foo=1", "teacher.foo is unknown: Teacher takes name, "),
        ("~data", "data is missing: task=teacher needs it"),
    ],
)
def test_what_a_task_of_evaluate_refuses(option, message):
    config = changed("task=teacher teacher=digits data=digits", option, program="evaluate")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        check_options(config, teacher.Options, "task=teacher")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("choices", ROWS)
def test_what_conf_holds_is_taken(choices):
    check_run(composed(choices))


def test_values_that_are_right():
    options = (
        "method.lr=1",
        "trainer.devices=[0,1]",
        "+trainer.deterministic=warn",
        "callbacks.progress=null",
        "name='7'",
    )
    check_run(changed(STUDENT, *options))
    check_run(changed("method=sfd", "method.steps=[1,2]", "method.solver_options=null"))


def test_nothing_is_built_of_a_node_with_a_foreign_one_in_it(tmp_path):
    node = OmegaConf.create({"_target_": "stillhouse.networks.MLP", "width": {"_target_": "pathlib.Path", "x": 1}})
    with pytest.raises(ValueError, match=r"^width=\{_target_:pathlib.Path,x:1\}: give a whole number"):
        build(node)
    listed = OmegaConf.create({"a": [{"b": {"_target_": "os.mkdir", "path": str(tmp_path / "made")}}]})
    with pytest.raises(ValueError, match=r"^a\[0\]\.b\._target_=os\.mkdir is not built"):
        check_targets(listed)
    assert not list(tmp_path.iterdir())
