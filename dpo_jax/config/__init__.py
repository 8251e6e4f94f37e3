"""Every option and every default, as frozen dataclasses. The field docstrings are the text of `--help`.

An option that would have no effect is an error: options that belong to one choice of another option are None where
they were not given, and `__post_init__` refuses them where they do not apply. What stands for them then, their class
says beside them (`not_given`), or a property computes it from others; code reads it by `resolved`, or as the property.
"""

from dpo_jax.config.aif import ASPECTS, AIFRun, WriterConfig
from dpo_jax.config.average import AverageRun
from dpo_jax.config.checks import ON_COMMAND_LINE, OPEN
from dpo_jax.config.commands import (
    CompletionRun,
    ConfigsRun,
    ConvertRun,
    DemoRun,
    EvalRun,
    ForwardRun,
    GenerateRun,
    InspectRun,
    LogpsRun,
    ReportRun,
    ScoreRun,
)
from dpo_jax.config.distill import DistillConfig, DistillRun, DistillStepConfig
from dpo_jax.config.dpo import BETAS, DPOConfig, DPOLossConfig, DPORun, Loss, Ties
from dpo_jax.config.dsft import DialogueFilterConfig, DSFTRun, SelfInstructConfig
from dpo_jax.config.frontier import FRONTIER_SIZES, FrontierConfig, FrontierRun
from dpo_jax.config.gatt import ConstraintKind, GattConfig, GattRun
from dpo_jax.config.iterative_rpo import IterativeRPORun
from dpo_jax.config.judge import EndpointConfig, JudgeRun, PairsRun
from dpo_jax.config.llama2_chat import SET_BY_RECIPE, ChatRecipeConfig, Llama2ChatRun
from dpo_jax.config.llama3 import Llama3Run
from dpo_jax.config.lm_eval import LmEvalRun
from dpo_jax.config.mt_bench import MTBenchAnswerRun, MTBenchJudgeRun, MTBenchShowRun
from dpo_jax.config.online_dpo import OnlineConfig, OnlineDPORun
from dpo_jax.config.plan import AssumeConfig, BenchRun, PlanRun
from dpo_jax.config.ppo import PPOConfig, PPOLossConfig
from dpo_jax.config.ppo_run import GRPORun, PPORun
from dpo_jax.config.prepare import PrepareRun
from dpo_jax.config.presets import PRESETS
from dpo_jax.config.rejection import RejectionConfig, RejectionRun
from dpo_jax.config.reward import ClassHead, RewardConfig, RewardLossConfig, RewardRun
from dpo_jax.config.safety import SafetyRun
from dpo_jax.config.sections import (
    GATHERED,
    LINEAR_LAYERS,
    TENSOR,
    TRAINING,
    AttentionKernel,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EnergyConfig,
    FilesConfig,
    Layout,
    LogConfig,
    LoraConfig,
    MeshConfig,
    Narrow,
    OptimizerConfig,
    Remat,
    SampleConfig,
    SampleLayout,
    TrainConfig,
)
from dpo_jax.config.sft import Proposal, SFTConfig, SFTDataConfig, SFTLossConfig, SFTRun, sft_inside
from dpo_jax.config.shipped import derive
from dpo_jax.config.talk import ChatRun, ServeRun, TalkOptions
from dpo_jax.config.training import HoldoutRun, JudgedRun, SampledRun, TrainingRun, is_url
from dpo_jax.config.vocabulary import ExtendVocabRun
from dpo_jax.config.win_rate import WinRateRun
from dpo_jax.config.zephyr import ZephyrRun

__all__ = [
    "ASPECTS",
    "BETAS",
    "FRONTIER_SIZES",
    "GATHERED",
    "LINEAR_LAYERS",
    "ON_COMMAND_LINE",
    "OPEN",
    "PRESETS",
    "SET_BY_RECIPE",
    "TENSOR",
    "TRAINING",
    "AIFRun",
    "AssumeConfig",
    "AttentionKernel",
    "AverageRun",
    "BenchRun",
    "ChatRecipeConfig",
    "ChatRun",
    "CheckpointConfig",
    "ClassHead",
    "CompletionRun",
    "ConfigsRun",
    "ConstraintKind",
    "ConvertRun",
    "DPOConfig",
    "DPOLossConfig",
    "DPORun",
    "DSFTRun",
    "DataConfig",
    "DemoRun",
    "DialogueFilterConfig",
    "DistillConfig",
    "DistillRun",
    "DistillStepConfig",
    "DistributedConfig",
    "EndpointConfig",
    "EnergyConfig",
    "EvalRun",
    "ExtendVocabRun",
    "FilesConfig",
    "ForwardRun",
    "FrontierConfig",
    "FrontierRun",
    "GRPORun",
    "GattConfig",
    "GattRun",
    "GenerateRun",
    "HoldoutRun",
    "InspectRun",
    "IterativeRPORun",
    "JudgeRun",
    "JudgedRun",
    "Layout",
    "Llama2ChatRun",
    "Llama3Run",
    "LmEvalRun",
    "LogConfig",
    "LogpsRun",
    "LoraConfig",
    "Loss",
    "MTBenchAnswerRun",
    "MTBenchJudgeRun",
    "MTBenchShowRun",
    "MeshConfig",
    "Narrow",
    "OnlineConfig",
    "OnlineDPORun",
    "OptimizerConfig",
    "PPOConfig",
    "PPOLossConfig",
    "PPORun",
    "PairsRun",
    "PlanRun",
    "PrepareRun",
    "Proposal",
    "RejectionConfig",
    "RejectionRun",
    "Remat",
    "ReportRun",
    "RewardConfig",
    "RewardLossConfig",
    "RewardRun",
    "SFTConfig",
    "SFTDataConfig",
    "SFTLossConfig",
    "SFTRun",
    "SafetyRun",
    "SampleConfig",
    "SampleLayout",
    "SampledRun",
    "ScoreRun",
    "SelfInstructConfig",
    "ServeRun",
    "TalkOptions",
    "Ties",
    "TrainConfig",
    "TrainingRun",
    "WinRateRun",
    "WriterConfig",
    "ZephyrRun",
    "derive",
    "is_url",
    "sft_inside",
]
