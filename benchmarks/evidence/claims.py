"""The papers' claims, each with the runs that test it."""

from dataclasses import dataclass

# The distance alone, no pictures on the way, and checkpoints at a GPU's pace, for at SIGTERM there is one anyway. TensorBoard is
# not on every machine.
COMMON = ("evaluation.metrics=[fid]", "callbacks.checkpoints.every_n_steps=1000", "callbacks.grid=null", "logger=csv")


@dataclass(frozen=True)
class Data:
    """What the runs are trained on.

    Attributes:
        options: Of train.py.
        teacher: In conf/teacher.
        flow: Its 1-RF.
    """

    options: tuple[str, ...]
    teacher: str
    flow: str


DATA = {
    "fashion_mnist16": Data(("data=fashion_mnist", "data.resolution=16"), "fashion_mnist", "fashion_mnist_rf1"),
    "digits": Data(("data=digits",), "digits", "digits_rf1"),
}


@dataclass(frozen=True)
class Run:
    """One training, of each seed.

    Attributes:
        name: Unique.
        options: Of train.py, in which {teacher} and {flow} are `Data`'s, and {NAME} the folder of another run of the same seed.
        steps: Numbers of evaluations at which its student is measured again after it.
        needs: Those other runs.
    """

    name: str
    options: tuple[str, ...]
    steps: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what is trained to see whether it holds here.

    Attributes:
        name: Of `--only`.
        paper: What the paper says.
        runs: The most valuable first.
    """

    name: str
    paper: str
    runs: tuple[Run, ...]


STUDENT_STEPS = 100
SIGMAS, FAKE_UPDATES = (2.5, 80), (1, 2)
SFD_STEPS, ROUND_STEPS = (2, 1, 4, 8), (1, 2, 4, 8)
FEW = (1, 2, 4)
# The paper's teacher: a deterministic first-order solver of 100 steps, for the pairs and beside the student.
_DDIM = ("teacher.solver=euler", f"teacher.steps={STUDENT_STEPS}")


def _score_distillation(sigma: float, fake_updates: int) -> tuple[str, str, tuple[str, ...]]:
    options = (f"method.sigma_init={sigma}", f"method.fake_updates={fake_updates}")
    ending = f"sigma{sigma}-fake{fake_updates}"
    return f"diff_instruct-{ending}", f"disback-{ending}", options


_SCORE_RUNS = [
    Run(name, (f"method={name.partition('-')[0]}", *options))
    for fake_updates in FAKE_UPDATES
    for sigma in SIGMAS
    for *names, options in [_score_distillation(sigma, fake_updates)]
    for name in names
]
_, _HARD, _HARD_OPTIONS = _score_distillation(SIGMAS[0], 1)
# Of the setting in which the path has most to give: one fake-score update.
PATHS = {"nodes1": "method.nodes=1", "nodes6": "method.nodes=6", "interval50": "method.interval=50"}
_SCORE_RUNS += [Run(f"{_HARD}-{name}", ("method=disback", *_HARD_OPTIONS, option)) for name, option in PATHS.items()]

STUDENT, DISBACK, B_DENSE, BEZIER, BASELINES = "denoising_student", "disback", "b_dense", "bezier", "baselines"
CLAIMS = (
    Claim(
        STUDENT,
        "one evaluation is near the teacher of 100 steps, about 100 times as fast (CIFAR-10: FID 9.36 against 4.16)",
        (Run("denoising_student", ("method=denoising_student", *_DDIM)),),
    ),
    Claim(DISBACK, "converges 2.5 to 13 times faster than Diff-Instruct", tuple(_SCORE_RUNS)),
    Claim(
        B_DENSE,
        "is ahead of its host at few evaluations, most early in training (CIFAR-10, SFD at 2: FID 4.40 against 4.53)",
        (
            *(
                Run(f"{name}-{n}", (f"method={method}", f"method.steps={n}"))
                for n in SFD_STEPS
                for name, method in (("sfd", "sfd"), ("b_dense_sfd", "b_dense"))
            ),
            Run("progressive", ("method=progressive",), ROUND_STEPS),
            Run("b_dense_progressive", ("method=b_dense", "host=progressive"), ROUND_STEPS),
            Run("b_dense_student", ("method=b_dense", "host=denoising_student", *_DDIM)),
        ),
    ),
    Claim(
        BEZIER,
        "one step is better than a distilled rectified flow's, with fewer reflows (no figures)",
        (
            Run("reflow", ("method=reflow", "teacher={flow}"), (1, 2)),
            Run("flow_distill-rf1", ("method=flow_distill", "teacher={flow}")),
            Run("flow_distill-rf2", ("method=flow_distill", "teacher={reflow}"), needs=("reflow",)),
            Run("bezier", ("method=bezier", "method.teachers=[{flow},{reflow}]"), needs=("reflow",)),
            # The control: both flows' ends, and no curve.
            Run(
                "bezier-order1",
                ("method=bezier", "method.teachers=[{flow},{reflow}]", "method.order=1"),
                needs=("reflow",),
            ),
            Run("flow_distill-rf1-2", ("method=flow_distill", "teacher={flow}", "method.steps=2")),
            Run("flow_distill-rf2-2", ("method=flow_distill", "teacher={reflow}", "method.steps=2"), needs=("reflow",)),
        ),
    ),
    Claim(
        BASELINES,
        "",
        (
            Run("ect", ("method=ect",), FEW),
            Run("sid", ("method=sid",)),
            Run("sida", ("method=sida",)),
            Run("dmd2", ("method=dmd2",)),
            Run("consistency_distillation", ("method=consistency_distillation",), FEW),
            Run("cmt", ("method=cmt",), FEW),
            Run("tcm", ("method=tcm", "teacher={ect}"), FEW, needs=("ect",)),
            Run("scm", ("method=scm",), FEW),
            Run("mean_flow", ("method=mean_flow", "teacher={flow}"), FEW),
            Run("imm", ("method=imm",), FEW),
            Run("moment_matching", ("method=moment_matching",)),
        ),
    ),
)
