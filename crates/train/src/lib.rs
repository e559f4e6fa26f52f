//! Adapters, optimisers, schedules, the key-value cache's policy and the trainer of unsloth-rs.
//!
//! Nothing here knows a model family: [`Trainer`] trains whatever [`Model::parameters`] returns. Computations return
//! [`unsloth_core::Error`] (they run inside tape closures); everything that steers a run returns [`Error`].

mod batch;
mod checkpointing;
mod draw;
mod error;
mod evaluate;
mod initial;
mod kv_cache;
mod linear;
mod lora;
mod loss_scale;
mod model;
mod optimizer;
mod precision;
mod schedule;
mod svd;
mod trace;
mod trainer;

pub use batch::{Batch, Document};
pub use checkpointing::{Checkpointing, Segment};
pub use draw::{Draw, DrawRows};
pub use error::{Error, Result};
pub use evaluate::evaluate;
pub use initial::normal_matrix;
pub use kv_cache::{KvCache, KvCacheSpec};
pub use linear::Linear;
pub use lora::{Adapter, LoraConfig, LoraInit};
pub use loss_scale::{LossScaleConfig, LossScaleError, LossScaleState, LossScaler, Unscaled};
pub use model::Model;
pub use optimizer::{
    AdafactorConfig, AdamWConfig, AdjustLr, LionConfig, MIN_8BIT_SIZE, MuonConfig, Optimizer, OptimizerConfig,
    OptimizerKind, Paging, Rates, Role, SgdConfig, set_value,
};
pub use precision::Precision;
pub use schedule::{Schedule, ScheduleKind};
pub use trace::{Named, NanTrace, Origin, Place};
pub use trainer::{PARAMETER, RunState, StateTensor, StepMetrics, Trainer, TrainerConfig};
