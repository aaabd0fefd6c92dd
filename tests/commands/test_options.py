"""Every option of every command, with a value other than its default, in miniature: the commands run one after another
as a user gives them, and each finds what the one before has left."""

import dataclasses
import itertools
import json
import shlex
from pathlib import Path

import pytest
import tyro

from diffusion_policy.cli import VERBS, main
from diffusion_policy.commands import evaluate, study_policies
from diffusion_policy.commands.options.flags import list_flags
from diffusion_policy.config import (
    ChunkingConfig,
    CnnConfig,
    CostConfig,
    DistillationConfig,
    ImageConfig,
    PolicyConfig,
    SampleConfig,
    SuccessAndModes,
    TrainConfig,
    TransformerConfig,
    UnetConfig,
    VitConfig,
)

SMALL = "--widths 16 32 --groups 4 --level-dim 16 --noise-levels 20 --steps 4 --batch-size 32 --device cpu"
FUTURES = """--action position --observation position velocity --observation-horizon 20 --prediction-horizon 80 \
    --action-horizon 1 --whole-windows --validation-share 0.5"""
BRIEF = '{"rows":1,"max_episode_steps":20}'
SESSION = f"""
collect --output a.zarr --env diffusion_policy/Avoid-v0 --env-kwargs '{{"rows":1}}' --episodes 6 --seed 50 --noise \
    0.2 --workers 1 --no-sync
collect --resume a.zarr --episodes 8 --workers 1
collect --output car.zarr --env MountainCarContinuous-v0 --image-size 16 --success 'return>=90' --fresh --noise 0.1 \
    --workers 1 --episodes 2 --expert diffusion_policy.envs.examples:MountainCarExpert --mode-function \
    diffusion_policy.envs.examples:mountain_car_mode --mode-labels left right
dataset inspect a.zarr --json
dataset validate a.zarr --json
dataset plot a.zarr --output plots --plane actual_xy:0,1 --action action
dataset replay a.zarr --episodes 1 --tolerance 1e-3 --env diffusion_policy/Avoid-v0 --env-kwargs '{{"rows":1}}' \
    --success none --image-size 16
dataset replay car.zarr --episodes 1 --success none --fresh --mode-function \
    diffusion_policy.envs.examples:mountain_car_mode --mode-labels left right --env MountainCarContinuous-v0
dataset render a.zarr --output ai.zarr --key image wrist_image --size 16 --tolerance 1e-3 --env \
    diffusion_policy/Avoid-v0 --env-kwargs '{{"rows":1}}' --success none --workers 1
dataset render car.zarr --output ci.zarr --key picture --size 8 --success none --fresh --mode-function \
    diffusion_policy.envs.examples:mountain_car_mode --mode-labels left right --workers 1
dataset split a.zarr --output b.zarr c.zarr --share 0.5 --seed 1
dataset merge b.zarr c.zarr --output d.zarr
dataset repair d.zarr
dataset goals a.zarr --output aimed.zarr --goal end=desired_xy
dataset instruct a.zarr --output told.zarr --instruction 'left=go left' --instruction 'go right' \
    --instruction-encoder {{module}}:measure
dataset convert d.zarr d.archive --output-format npz --observation desired_xy --action action --angles desired_xy:0
dataset convert d.archive e.zarr --source-format npz
train --dataset a.zarr --output r {SMALL} --observation desired_xy actual_xy --action action --angles \
    desired_xy:0 --tracker tensorboard --env diffusion_policy/Avoid-v0 --env-kwargs '{BRIEF}' \
    --image-size 16 --observation-horizon 3 --prediction-horizon 8 --action-horizon 4 --kernel-size 3 --schedule \
    linear --schedule-options 0.001 0.3 --prediction velocity --snr-gamma 5 --learn-variance --condition-dropout 0.2 \
    --normalization moments --condition-on-mode --learning-rate 1e-3 --weight-decay 1e-4 --warmup-steps 1 \
    --gradient-clip 0.5 --ema-power 0.6 --ema-max-decay 0.9 --validation-share 0.2 --max-episodes 3 \
    --memory-gb 0 --validate-every 2 --checkpoint-every 2 --keep-checkpoints 2 --keep-best validation_loss \
    --rollout-every 4 --rollout-episodes 2 --precision bf16 --accumulation 2 --seed 3
train --dataset told.zarr --output rt {SMALL} --condition-on-instruction --condition-dropout 0.2
rollout --checkpoint rt --instruction 'turn left' --instruction-encoder {{module}}:measure --episodes 1 --workers 1 \
    --env-kwargs '{BRIEF}' --backend eager
evaluate --checkpoint rt --output et --instruction 'turn left' --instruction-encoder {{module}}:measure --episodes 1 \
    --workers 1 --env-kwargs '{BRIEF}' --videos 0
study instructions --checkpoint rt --output si --instruction 'left=turn left' --instruction 'go right' \
    --instruction-encoder {{module}}:measure --guidances 0 0.5 --episodes 1 --workers 1 --env-kwargs '{BRIEF}'
train --dataset ai.zarr --output rv {SMALL} --observation image wrist_image desired_xy actual_xy --vision vit \
    --vit-width 8 --vit-layers 2 --vit-heads 2 --image-features 8 --image-crop 1 --color-jitter 0.1 --share-encoder \
    --image-normalization channels --goal desired_xy --hindsight desired_xy=actual_xy --hindsight-share 0.4 \
    --mask-padding --whole-windows --noise-draws 2 --condition-dropout 0.2
train --dataset ai.zarr --output rc {SMALL} --observation image --cnn-widths 4 8 --keypoints 3
train --resume r
train --config r/best/config.json --dataset a.zarr --output s --steps 2 --rollout-every 0 --device cpu
evaluate --checkpoint r --output ev --episodes 2 --seed 100500 --repeats 2 --delay-steps 1 --env \
    diffusion_policy/Avoid-v0 --env-kwargs '{BRIEF}' --success none --fresh --sampler dpm-solver-2m \
    --sampling-steps 3 --spacing even --clip dynamic --guidance 0.5 --guidance-schedule falling --mode left \
    --corrector-steps 1 --corrector-size 0.02 --parallel 2 --action-horizon 3 --workers 1 --hang-after 30 \
    --videos 1 --device cpu --image-size 16
evaluate --checkpoint r --output ew --episodes 2 --seed 100500 --repeats 2 --success none --fresh --eta 0.5 \
    --sampling-steps 2 --jump-from 0.5 --workers 1 --videos 0 --mode-function {{module}}:label --mode-labels up down
report ev --output again.html
compare ev ev --output cmp --json
rollout --checkpoint r --episodes 1 --seed 100600 --video v.gif --record rec.zarr --env diffusion_policy/Avoid-v0 \
    --image-size 16 --env-kwargs '{BRIEF}' --success none --fresh --mode-function {{module}}:label --mode-labels up \
    down --sampler unipc --sampling-steps 2 --spacing leading --clip none --guidance 0.5 --guidance-schedule middle \
    --mode right --corrector-steps 1 --corrector-size 0.1 --action-horizon 2 --workers 1 --device cpu
rollout --checkpoint r --episodes 1 --sampling-steps 2 --env-kwargs '{{"rows":1,"image_size":16}}' \
    --record kept.zarr --keep-images --workers 1
rollout --checkpoint r --episodes 1 --sampling-steps 2 --eta 0.3 --workers 1 --backend eager --precision bf16
rollout --checkpoint r --episodes 2 --sampling-steps 2 --env {{module}}:tiny/Window-v0 --render human
study samplers --checkpoint r --output st --samplers ddim --steps 1 2 --mode left --guidance 0.5 --episodes 1 \
    --chunking bid --image-size 16 \
    --seed 100700 --env diffusion_policy/Avoid-v0 --env-kwargs '{BRIEF}' --success none --fresh \
    --mode-function {{module}}:label --mode-labels up down --action-horizon 2 --workers 1 --device cpu
train --dataset a.zarr --output t --network transformer --width 16 --layers 2 --heads 2 --mlp-ratio 2 --dropout 0.1 \
    --conditioning cross-attention --level-dim 16 --noise-levels 20 --prediction-horizon 9 --steps 2 --device cpu
evaluate --checkpoint t --output etr --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --videos 0 --workers 1
train --dataset a.zarr --output m {SMALL} --max-delay 3
train --dataset a.zarr --output rel {SMALL} --action-form relative --action-reference actual_xy:0,1 --max-delay 3
evaluate --checkpoint rel --output erel --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --videos 0 --workers 1 \
    --chunking trained-rtc --delay-steps 2
train --dataset a.zarr --output mx {SMALL} --objective mixture --mixture-components 3
evaluate --checkpoint mx --output emx --episodes 1 --env-kwargs '{BRIEF}' --videos 0 --workers 1
train --dataset a.zarr --output pa --teacher m --student pairs --student-steps 2 --teacher-steps 4 --pairs 40 \
    --pair-noise 0.1 --guard stop --steps 4 --batch-size 32 --device cpu
evaluate --checkpoint pa --output epa --episodes 1 --env-kwargs '{BRIEF}' --videos 0 --workers 1 --no-teacher
study networks --checkpoint m --output sn --beside pa mx --episodes 1 --env-kwargs '{BRIEF}' --workers 1
evaluate --checkpoint m --output em --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --videos 0 --workers 1 \
    --chunking trained-rtc --delay-steps 2 --roll-forward
evaluate --checkpoint m --output en --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --videos 0 --workers 1 \
    --chunking rtc --rtc-strength 2 --rtc-mask linear --rtc-deviation 0.5 --delay-steps 1
rollout --checkpoint m --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --workers 1 --backend eager \
    --delay-steps 1 --chunking bid --plans 3 --bid-decay 0.7 --weak-checkpoint m
rollout --checkpoint m --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --workers 1 \
    --cost smoothness=0.1 length --cost-from 0.5 --cost-steps 2 --cost-size 0.1 --cost-margin 0.1 --cost-key action \
    --plans 2 --score costs
rollout --checkpoint m --episodes 1 --sampling-steps 2 --env-kwargs '{BRIEF}' --workers 1 --backend eager \
    --chunking ensemble --ensemble-decay 0.1 --plans 2 --score {{module}}:score
study chunking --checkpoint m --output sc --delay-steps 1 --strategies receding rtc+roll --action-noise 0.2 --steps 2 \
    --episodes 1 --env-kwargs '{BRIEF}' --workers 1
run-robot diffusion_policy.envs.simulated_robot:SimulatedRobot --checkpoint m --output ro --hz 20 --steps 4 \
    --robot-kwargs '{{"env_kwargs":{BRIEF}}}' --seed 1 --dry-run --action-horizon 2 --delay-steps 1 --watchdog 20 \
    --chunking ensemble --low -1 --high 1 --change 0.5 --rate 10 --sampling-steps 2 --backend eager \
    --device cpu --precision bf16
collect --output x.zarr --env diffusion_policy/Intersection-v0 --episodes 4 --noise 0 --workers 1 --no-sync
train --dataset x.zarr --output fo {SMALL} {FUTURES}
train --dataset x.zarr --output fr {SMALL} {FUTURES} --objective regression
forecast --checkpoint fo --dataset x.zarr --output ff --beside fr --now 19 --samples 6 --episodes 1 --seed 2 \
    --miss-distance 1 --collision-distance 2 --mode-function {{module}}:come --mode-labels far near --shown 1 \
    --device cpu --sampling-steps 2
doctor --dataset a.zarr --checkpoint r --output doc --overfit-steps 3 --seed 1 --device cpu --sampler euler \
    --sampling-steps 2 --spacing even --clip none --guidance 0.5 --guidance-schedule rising --mode left \
    --corrector-steps 1 --corrector-size 0.1
doctor --dataset a.zarr --observation desired_xy --action action --angles desired_xy:0 --overfit-steps 0 --eta 0.5 \
    --observation-horizon 3 --prediction-horizon 8 --action-horizon 4 --widths 16 32 --kernel-size 3 --groups 4 \
    --level-dim 16 --schedule linear --noise-levels 20 --schedule-options 0.001 0.3 --prediction velocity \
    --snr-gamma 5 --learn-variance --condition-dropout 0.2 --normalization moments --condition-on-mode
"""
"""What a user types, a line a command."""

LONG = f"""
collect --output a.zarr --env-kwargs '{{"rows":1}}' --episodes 4 --engine ray
train --dataset a.zarr --output t {SMALL} --condition-on-mode --condition-dropout 0.2
sweep --dataset a.zarr --output v --config t/step-000004/config.json --grid seed=4 steps=2 --episodes 1 --metric \
    success_rate --rollout-every 0 --observation desired_xy --action action --angles desired_xy:0 --device cpu \
    --workers 2 --sampler ddpm --sampling-steps 2 --spacing even --clip dynamic --guidance 0.5 --guidance-schedule \
    rising --mode left --corrector-steps 1 --corrector-size 0.02
train --dataset a.zarr --output r {SMALL} --compile
dataset replay a.zarr --episodes 1 --video replay.gif
evaluate --checkpoint r --output ev --episodes 2 --engine ray --sampling-steps 2
evaluate --checkpoint r --output ew --episodes 2 --backend compile --sampling-steps 2
export --checkpoint r --output ex --batch 2 --samples 2 --form network --precision int8 --dtype float32 --tolerance 9 \
    --control-rate 10 --sampling-steps 2
benchmark --checkpoint r --output b --only planning data --profile --rows 2 --samples 3 --backends eager --plans 2 \
    --sampling-steps 2 --spacing even --clip none --control-rate 1000 --device cpu
benchmark --only rollout planning --env diffusion_policy/Avoid-v0 --episodes 1 --workers 1 --rows 1 --samples 1 \
    --backends eager --plans 1 --observation-horizon 3 --prediction-horizon 8 --action-horizon 4 --widths 16 32 \
    --kernel-size 3 --groups 4 --level-dim 16 --schedule linear --noise-levels 20 --schedule-options 0.001 0.3 \
    --prediction velocity --snr-gamma 5 --learn-variance --condition-dropout 0.2 --normalization moments \
    --condition-on-mode --sampler euler --sampling-steps 2 --guidance 0.5 --guidance-schedule rising --mode one \
    --corrector-steps 1 --corrector-size 0.1
benchmark --only planning --rows 1 --samples 1 --backends eager --plans 1 --eta 0.3 --sampling-steps 2 --widths 8 16
sweep --dataset a.zarr --output w {SMALL} --random learning-rate=log:1e-4:1e-3 --runs 1 --episodes 0 --engine ray
sweep --dataset a.zarr --output w {SMALL} --random learning-rate=log:1e-4:1e-3 --runs 2 --episodes 0 --resume
"""
"""What takes a compiler, an exporter or a cluster."""

MODULE = """
import gymnasium, numpy as np

class Window(gymnasium.Env):
    metadata = {"render_modes": ["human"], "render_fps": 1000}

    def __init__(self, render_mode=None):
        box = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"desired_xy": box, "actual_xy": box})
        self.action_space, self.render_mode = box, render_mode

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.render_mode == "human"
        return self.observation_space.sample(), 0.0, True, False, {"is_success": True}

gymnasium.register("tiny/Window-v0", Window)

def measure(text):
    return [len(text), text.count("l")]

def score(observations, plans):
    return -np.abs(plans).sum(axis=(2, 3))

def come(observations):
    return "far" if observations["position"][-1, 1] > 0 else "near"

def label(observations):
    path = observations["desired_xy"]
    return "up" if path[-1, 1] > path[0, 1] else "down"
"""

NOT_HERE = {
    "gpus",
    "rotations",
    "target", "prediction_stride", "inverse_dynamics", "inpaint_start", "inpaint_goal",
    "plan_samples",
    "teacher_weights",
    "vision_weights",
    "freeze_vision",
    "classifier", "classifier_mode", "classifier_weight",
    "latent", "latent_channels", "latent_stride", "latent_width", "latent_kl",
}  # fmt: skip
UNTRIED = {
    "train-latent": "test_latent.py",
    "train-classifier": "test_classifier.py",
    "demo": "test_demo.py",
    "toy": "test_toy.py",
    "serve": "test_serve.py",
    "live": "test_live.py",
}
"""Commands that have tests of their own and no smaller size."""


def lines(session: str = SESSION) -> list[list[str]]:
    return [shlex.split(line) for line in session.strip().splitlines()]


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("session", [SESSION, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_every_command_of_a_session_finds_what_the_one_before_has_left(
    session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"labels_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(evaluate, "LATENCY_PLANS", 6)
    monkeypatch.setattr(study_policies, "resolve_backend", lambda *_: "eager")  # or it would make a graph for each
    for line in lines(session):
        line = [part.replace("{module}", module) for part in line]
        status = main(line)
        said = capsys.readouterr()
        wanted = (0, 1) if line[0] == "doctor" else (0,)  # a policy of four steps is not healthy
        assert status in wanted, f"{shlex.join(line)}\n{said.err}"
        if "--json" in line:
            json.loads(said.out)


def test_the_session_gives_every_option_a_value_other_than_its_default() -> None:
    for verb, kind in VERBS.items():
        if verb not in UNTRIED:
            require_all(kind, given_to(verb), verb)
    networks = UnetConfig, TransformerConfig
    shared = (  # by several verbs
        PolicyConfig, ImageConfig, CnnConfig, VitConfig, TrainConfig, DistillationConfig, SampleConfig, ChunkingConfig,
        CostConfig, SuccessAndModes,
    )  # fmt: skip
    for config in (*networks, *shared):
        require_all(config, given_to(), config.__name__)


def given_to(verb: str | None = None) -> dict[str, set[str]]:
    """{flag: texts that the session gives it}, of one verb or of all."""
    given: dict[str, set[str]] = {}
    for line in lines(SESSION) + lines(LONG):
        if verb in (None, " ".join(line[:2]) if line[0] == "dataset" else line[0]):
            for i, part in enumerate(line):
                if part.startswith("--"):
                    values = itertools.takewhile(lambda text: not text.startswith("--"), line[i + 1 :])
                    given.setdefault(part.removeprefix("--").removeprefix("no-"), set()).add(" ".join(values))
    return given


def require_all(kind: type, given: dict[str, set[str]], name: str) -> None:
    """Every field of a dataclass that is a flag of its own is given what is not its default."""
    own = {option.name for option in dataclasses.fields(kind)}
    for flag in list_flags(kind):
        positional = tyro.conf.Positional in getattr(flag.hint, "__metadata__", ())
        if positional or flag.name not in own or flag.name in NOT_HERE:
            continue
        option = flag.name.replace("_", "-")
        usual = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default)
        assert given.get(option, set()) - {usual}, f"no test gives {name} another --{option} than {usual}"
