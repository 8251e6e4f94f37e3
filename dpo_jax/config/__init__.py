"""Every option and every default, as frozen dataclasses. The field docstrings are the text of `--help`.

An option that would have no effect is an error: options that belong to one choice of another option are None where
they were not given, and `__post_init__` refuses them where they do not apply. What stands for them then, their class
says beside them (`not_given`), or a property computes it from others; code reads it by `resolved`, or as the property.
"""

from dpo_jax.config.aif import ASPECTS as ASPECTS
from dpo_jax.config.aif import AIFRun as AIFRun
from dpo_jax.config.aif import WriterConfig as WriterConfig
from dpo_jax.config.average import AverageRun as AverageRun
from dpo_jax.config.checks import ON_COMMAND_LINE as ON_COMMAND_LINE
from dpo_jax.config.checks import OPEN as OPEN
from dpo_jax.config.checks import SET_BY_RECIPE as SET_BY_RECIPE
from dpo_jax.config.commands import (
    CompletionRun as CompletionRun,
)
from dpo_jax.config.commands import (
    ConfigsRun as ConfigsRun,
)
from dpo_jax.config.commands import (
    ConvertRun as ConvertRun,
)
from dpo_jax.config.commands import (
    DemoRun as DemoRun,
)
from dpo_jax.config.commands import (
    EvalRun as EvalRun,
)
from dpo_jax.config.commands import (
    ForwardRun as ForwardRun,
)
from dpo_jax.config.commands import (
    GenerateRun as GenerateRun,
)
from dpo_jax.config.commands import (
    InspectRun as InspectRun,
)
from dpo_jax.config.commands import (
    LogpsRun as LogpsRun,
)
from dpo_jax.config.commands import (
    ReportRun as ReportRun,
)
from dpo_jax.config.commands import (
    ScoreRun as ScoreRun,
)
from dpo_jax.config.distill import (
    DistillConfig as DistillConfig,
)
from dpo_jax.config.distill import (
    DistillRun as DistillRun,
)
from dpo_jax.config.distill import (
    DistillStepConfig as DistillStepConfig,
)
from dpo_jax.config.dpo import (
    BETAS as BETAS,
)
from dpo_jax.config.dpo import (
    DPOConfig as DPOConfig,
)
from dpo_jax.config.dpo import (
    DPOLossConfig as DPOLossConfig,
)
from dpo_jax.config.dpo import (
    DPORun as DPORun,
)
from dpo_jax.config.dpo import (
    Loss as Loss,
)
from dpo_jax.config.dpo import (
    Ties as Ties,
)
from dpo_jax.config.dsft import (
    DialogueFilterConfig as DialogueFilterConfig,
)
from dpo_jax.config.dsft import (
    DSFTRun as DSFTRun,
)
from dpo_jax.config.dsft import (
    SelfInstructConfig as SelfInstructConfig,
)
from dpo_jax.config.frontier import (
    FRONTIER_SIZES as FRONTIER_SIZES,
)
from dpo_jax.config.frontier import (
    FrontierConfig as FrontierConfig,
)
from dpo_jax.config.frontier import (
    FrontierRun as FrontierRun,
)
from dpo_jax.config.gatt import ConstraintKind as ConstraintKind
from dpo_jax.config.gatt import GattConfig as GattConfig
from dpo_jax.config.gatt import GattRun as GattRun
from dpo_jax.config.iterative_rpo import IterativeRPORun as IterativeRPORun
from dpo_jax.config.judge import EndpointConfig as EndpointConfig
from dpo_jax.config.judge import JudgeRun as JudgeRun
from dpo_jax.config.judge import PairsRun as PairsRun
from dpo_jax.config.llama2_chat import ChatRecipeConfig as ChatRecipeConfig
from dpo_jax.config.llama2_chat import Llama2ChatRun as Llama2ChatRun
from dpo_jax.config.llama3 import Llama3Run as Llama3Run
from dpo_jax.config.lm_eval import LmEvalRun as LmEvalRun
from dpo_jax.config.mt_bench import (
    MTBenchAnswerRun as MTBenchAnswerRun,
)
from dpo_jax.config.mt_bench import (
    MTBenchJudgeRun as MTBenchJudgeRun,
)
from dpo_jax.config.mt_bench import (
    MTBenchShowRun as MTBenchShowRun,
)
from dpo_jax.config.online_dpo import OnlineConfig as OnlineConfig
from dpo_jax.config.online_dpo import OnlineDPORun as OnlineDPORun
from dpo_jax.config.plan import AssumeConfig as AssumeConfig
from dpo_jax.config.plan import BenchRun as BenchRun
from dpo_jax.config.plan import PlanRun as PlanRun
from dpo_jax.config.ppo import PPOConfig as PPOConfig
from dpo_jax.config.ppo import PPOLossConfig as PPOLossConfig
from dpo_jax.config.ppo_run import GRPORun as GRPORun
from dpo_jax.config.ppo_run import PPORun as PPORun
from dpo_jax.config.prepare import PrepareRun as PrepareRun
from dpo_jax.config.presets import PRESETS as PRESETS
from dpo_jax.config.rejection import RejectionConfig as RejectionConfig
from dpo_jax.config.rejection import RejectionRun as RejectionRun
from dpo_jax.config.reward import (
    ClassHead as ClassHead,
)
from dpo_jax.config.reward import (
    RewardConfig as RewardConfig,
)
from dpo_jax.config.reward import (
    RewardLossConfig as RewardLossConfig,
)
from dpo_jax.config.reward import (
    RewardRun as RewardRun,
)
from dpo_jax.config.safety import SafetyRun as SafetyRun
from dpo_jax.config.sections import (
    GATHERED as GATHERED,
)
from dpo_jax.config.sections import (
    LINEAR_LAYERS as LINEAR_LAYERS,
)
from dpo_jax.config.sections import (
    TENSOR as TENSOR,
)
from dpo_jax.config.sections import (
    TRAINING as TRAINING,
)
from dpo_jax.config.sections import (
    AttentionKernel as AttentionKernel,
)
from dpo_jax.config.sections import (
    CheckpointConfig as CheckpointConfig,
)
from dpo_jax.config.sections import (
    DataConfig as DataConfig,
)
from dpo_jax.config.sections import (
    DistributedConfig as DistributedConfig,
)
from dpo_jax.config.sections import (
    EnergyConfig as EnergyConfig,
)
from dpo_jax.config.sections import (
    FilesConfig as FilesConfig,
)
from dpo_jax.config.sections import (
    Layout as Layout,
)
from dpo_jax.config.sections import (
    LogConfig as LogConfig,
)
from dpo_jax.config.sections import (
    LoraConfig as LoraConfig,
)
from dpo_jax.config.sections import (
    MeshConfig as MeshConfig,
)
from dpo_jax.config.sections import (
    Narrow as Narrow,
)
from dpo_jax.config.sections import (
    OptimizerConfig as OptimizerConfig,
)
from dpo_jax.config.sections import (
    Remat as Remat,
)
from dpo_jax.config.sections import (
    SampleConfig as SampleConfig,
)
from dpo_jax.config.sections import (
    SampleLayout as SampleLayout,
)
from dpo_jax.config.sections import (
    TrainConfig as TrainConfig,
)
from dpo_jax.config.sft import (
    Proposal as Proposal,
)
from dpo_jax.config.sft import (
    SFTConfig as SFTConfig,
)
from dpo_jax.config.sft import (
    SFTDataConfig as SFTDataConfig,
)
from dpo_jax.config.sft import (
    SFTLossConfig as SFTLossConfig,
)
from dpo_jax.config.sft import (
    SFTRun as SFTRun,
)
from dpo_jax.config.sft import (
    sft_inside as sft_inside,
)
from dpo_jax.config.shipped import derive as derive
from dpo_jax.config.talk import ChatRun as ChatRun
from dpo_jax.config.talk import ServeRun as ServeRun
from dpo_jax.config.talk import TalkOptions as TalkOptions
from dpo_jax.config.training import (
    HoldoutRun as HoldoutRun,
)
from dpo_jax.config.training import (
    JudgedRun as JudgedRun,
)
from dpo_jax.config.training import (
    SampledRun as SampledRun,
)
from dpo_jax.config.training import (
    TrainingRun as TrainingRun,
)
from dpo_jax.config.training import (
    is_url as is_url,
)
from dpo_jax.config.vocabulary import ExtendVocabRun as ExtendVocabRun
from dpo_jax.config.win_rate import WinRateRun as WinRateRun
from dpo_jax.config.zephyr import ZephyrRun as ZephyrRun
