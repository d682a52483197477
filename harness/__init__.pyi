"""The names of the public face and where each of them lives. `harness` reads this file when a name is asked for."""

from harness.capabilities import (
    AddedTrigger as AddedTrigger,
    AttackersSampler as AttackersSampler,
    BatchedMethod as BatchedMethod,
    BuildableModel as BuildableModel,
    CheckpointedModel as CheckpointedModel,
    ComputedTrigger as ComputedTrigger,
    ConditionalTarget as ConditionalTarget,
    CountedData as CountedData,
    CountingDetector as CountingDetector,
    DecoyTrigger as DecoyTrigger,
    DeliveringDefense as DeliveringDefense,
    ExamplesTarget as ExamplesTarget,
    ExtraSetsMetric as ExtraSetsMetric,
    GuidedSampler as GuidedSampler,
    JudgingDetector as JudgingDetector,
    LabelledTarget as LabelledTarget,
    LetterTrigger as LetterTrigger,
    LibraryDependent as LibraryDependent,
    LimitedToModels as LimitedToModels,
    LoopedMethod as LoopedMethod,
    MeasuredWork as MeasuredWork,
    MislabellingTarget as MislabellingTarget,
    NeedsOfTrigger as NeedsOfTrigger,
    NounTarget as NounTarget,
    OfFamily as OfFamily,
    OnBiasedNoise as OnBiasedNoise,
    OrdinaryTrigger as OrdinaryTrigger,
    ParaphrasedTrigger as ParaphrasedTrigger,
    PartlyKnownTrigger as PartlyKnownTrigger,
    PastedTarget as PastedTarget,
    PerSampleMetric as PerSampleMetric,
    PictureModel as PictureModel,
    PictureTarget as PictureTarget,
    PlacedTrigger as PlacedTrigger,
    ProbabilityJudge as ProbabilityJudge,
    PromptTarget as PromptTarget,
    PublishedArchitecture as PublishedArchitecture,
    RepeatedTrigger as RepeatedTrigger,
    ReplacingTarget as ReplacingTarget,
    RewordableTrigger as RewordableTrigger,
    ScalingTrigger as ScalingTrigger,
    ScheduledSampler as ScheduledSampler,
    SeveralTrigger as SeveralTrigger,
    StatingDetector as StatingDetector,
    SteppedMethod as SteppedMethod,
    TaughtTarget as TaughtTarget,
    TokenTrigger as TokenTrigger,
    TriggerDependentTarget as TriggerDependentTarget,
    TriggeredSampler as TriggeredSampler,
    WordedTarget as WordedTarget,
    WrappingSampler as WrappingSampler,
    encoders_of as encoders_of,
    name_of as name_of,
    offers as offers,
)
from harness.diffusion import (
    adapters as adapters,
    attention as attention,
    checkpoint as checkpoint,
    interrupted as interrupted,
    kept_scores as kept_scores,
    kept_tensors as kept_tensors,
)
from harness.diffusion.events import (
    loop as loop,
    progress as progress,
)
from harness.diffusion.images import (
    as_rgb as as_rgb,
    from_uint8 as from_uint8,
    to_uint8 as to_uint8,
    to_unit as to_unit,
)
from harness.diffusion.interrupted import (
    Kept as Kept,
)
from harness.diffusion.model import (
    DiffusionModel as DiffusionModel,
)
from harness.diffusion.samplers import (
    DDIM as DDIM,
    DDPM as DDPM,
    SAMPLERS as SAMPLERS,
    AroundAnother as AroundAnother,
    FlowEuler as FlowEuler,
    FlowHeun as FlowHeun,
    OnChangedPrompts as OnChangedPrompts,
    PredictorCorrector as PredictorCorrector,
    SchedulerSampler as SchedulerSampler,
    usual as usual,
)
from harness.diffusion.seeds import (
    derive as derive,
    generator as generator,
    image_noise as image_noise,
    image_seeds as image_seeds,
)
from harness.diffusion.training import (
    Examples as Examples,
    denoising_loss as denoising_loss,
    draw as draw,
    minimize as minimize,
    minimize_in_two as minimize_in_two,
)
from harness.judges import (
    classifiers as classifiers,
    digits as digits,
    fidelity as fidelity,
    image_folders as image_folders,
    public_encoders as public_encoders,
    shapes as shapes,
    shapes_clip as shapes_clip,
    statistics as statistics,
)
from harness.judges.classifiers import (
    CNNJudge as CNNJudge,
)
from harness.judges.evidence import (
    ABSENT as ABSENT,
    Evidence as Evidence,
    Given as Given,
    Who as Who,
)
from harness.judges.hub import (
    Source as Source,
)
from harness.judges.shapes import (
    SHAPES as SHAPES,
    STAR as STAR,
    STYLES as STYLES,
)
from harness.judges.statistics import (
    mean as mean,
    rate as rate,
    unmeasured as unmeasured,
)
from harness.methods import (
    coarse_to_fine as coarse_to_fine,
    corner_patches as corner_patches,
    distillation as distillation,
    image_encoders as image_encoders,
    inversion as inversion,
    noise_attacks as noise_attacks,
    parameters as parameters,
    piecewise_flow as piecewise_flow,
    prompt_edits as prompt_edits,
    prompt_screening as prompt_screening,
    pruning as pruning,
    trigger_placement as trigger_placement,
    weight_edits as weight_edits,
)
from harness.methods.attention_guidance import (
    Goal as Goal,
    GuidedDistillation as GuidedDistillation,
    Neutral as Neutral,
    Stamp as Stamp,
)
from harness.methods.corner_patches import (
    Corner as Corner,
)
from harness.methods.distillation import (
    Latents as Latents,
    LatentSource as LatentSource,
)
from harness.methods.evasion import (
    Evasion as Evasion,
    Rows as Rows,
)
from harness.methods.inversion import (
    Through as Through,
)
from harness.methods.learned_triggers import (
    LearnedTrigger as LearnedTrigger,
    LearningAttack as LearningAttack,
)
from harness.methods.parameters import (
    Fraction as Fraction,
    LearningRate as LearningRate,
    PositiveInt as PositiveInt,
    Weight as Weight,
)
from harness.methods.prompt_edits import (
    LOOK_ALIKES as LOOK_ALIKES,
    Insertion as Insertion,
    Removal as Removal,
    Substitution as Substitution,
)
from harness.methods.prompt_screening import (
    Guide as Guide,
    MapRun as MapRun,
    Share as Share,
)
from harness.methods.pruning import (
    Importance as Importance,
    Pruning as Pruning,
    Rounding as Rounding,
    Scope as Scope,
)
from harness.methods.trojan import (
    TrojanDDIM as TrojanDDIM,
    TrojanDDPM as TrojanDDPM,
)
from harness.models import (
    captioned_shapes as captioned_shapes,
    provenance as provenance,
    real_data as real_data,
    training_recipes as training_recipes,
)
from harness.models.captioned_shapes import (
    CaptionedShapes as CaptionedShapes,
)
from harness.models.embedded_models import (
    Embedded as Embedded,
    EmbeddedDigits as EmbeddedDigits,
)
from harness.models.hub_models import (
    Published as Published,
    Trainable as Trainable,
    Work as Work,
)
from harness.models.real_data import (
    RealData as RealData,
)
from harness.registry.hookspecs import (
    hookimpl as hookimpl,
)
from harness.types import (
    Adaptive as Adaptive,
    Attack as Attack,
    Backdoor as Backdoor,
    Backdoored as Backdoored,
    Cell as Cell,
    Data as Data,
    Defended as Defended,
    Defense as Defense,
    Family as Family,
    ImageEncoder as ImageEncoder,
    Inputs as Inputs,
    Judge as Judge,
    Knowledge as Knowledge,
    Metric as Metric,
    Modality as Modality,
    Model as Model,
    NoiseTrigger as NoiseTrigger,
    PerceptualEncoder as PerceptualEncoder,
    Sampler as Sampler,
    Score as Score,
    Target as Target,
    TargetContext as TargetContext,
    TextImageScorer as TextImageScorer,
    TextTrigger as TextTrigger,
    Trigger as Trigger,
)

def homes() -> dict[str, str]: ...
