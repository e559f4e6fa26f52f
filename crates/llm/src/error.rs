//! The error type of models, files and recipes.

use std::path::{Path, PathBuf};

use unsloth_core::{DType, Shape};

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a folder on disk and a trained adapter. Messages name the file, the field, the value
/// and the rule; what a library reported is the `source`.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operator or an allocation failed.
    #[error(transparent)]
    Core(#[from] unsloth_core::Error),
    /// Training failed or was configured wrongly.
    #[error(transparent)]
    Train(#[from] unsloth_train::Error),
    /// Options, output folder or checkpoints of a run are not usable.
    #[error(transparent)]
    Run(#[from] crate::recipe::RunError),
    /// A file could not be read or written.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried: `read`, `write`, `map`, `create`, `rename`, `remove`, `draw`, `lock`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system reported.
        #[source]
        source: std::io::Error,
    },
    /// A file is not JSON, or not of the form expected.
    #[error("`{}`: not the expected JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// A field of a model's configuration is missing, out of range or not supported.
    #[error("`{}`: `{field}` = {value}, must be {rule}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Field, nested ones with dots.
        field: String,
        /// Value found, as JSON; `missing` where there is none.
        value: String,
        /// What is accepted.
        rule: &'static str,
    },
    /// The model is of a family that this crate does not have.
    #[error("`{}`: architecture `{name}` is not supported (supported: {})", path.display(), crate::family::supported())]
    UnsupportedArchitecture {
        /// The file.
        path: PathBuf,
        /// `model_type`, or the class name where that is what differs.
        name: String,
    },
    /// A model is given by its name on the Hugging Face Hub, which this build does not reach.
    #[error(
        "`{name}` is not a folder, and models by their names on the Hugging Face Hub need a build with the feature `hub` (cargo build --release --features hub)"
    )]
    HubFeature {
        /// The name given.
        name: String,
    },
    /// A model could not be taken from the Hugging Face Hub.
    #[error("`{name}` is not a folder, and cannot be taken from the Hugging Face Hub")]
    Hub {
        /// The name given.
        name: String,
        /// What failed: the connection, the Hub's answer, the cache.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A folder holds no weights in a form that is read.
    #[error("`{}`: neither `model.safetensors` nor `model.safetensors.index.json` found", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A file that the index of a sharded checkpoint names does not exist.
    #[error("`{}`: shard `{shard}` is missing", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The file it names.
        shard: String,
    },
    /// A safetensors file is truncated or damaged.
    #[error("`{}`: not a complete safetensors file", path.display())]
    CorruptWeights {
        /// The file.
        path: PathBuf,
        /// What the parser reported.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A tensor that the model needs is not in the file.
    #[error("`{}`: tensor `{name}` is missing", path.display())]
    MissingTensor {
        /// The file or index searched.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
    },
    /// The index says that a shard holds a tensor, but it does not, or two shards hold it.
    #[error("`{}`: tensor `{name}` is {what}", path.display())]
    MisplacedTensor {
        /// The index file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// How index and shards disagree.
        what: &'static str,
    },
    /// The device does not take a tensor.
    #[error("`{}`: tensor `{name}`", path.display())]
    PlaceTensor {
        /// The file or index.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Why not.
        #[source]
        source: Box<unsloth_core::Error>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("`{}`: tensor `{name}` has shape {actual:?}, expected {expected}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape that follows from the configuration.
        expected: Shape,
        /// Shape stored.
        actual: Vec<usize>,
    },
    /// A tensor's element type is not one that is read.
    #[error("`{}`: tensor `{name}` has dtype {actual}, must be F32, F16 or BF16", path.display())]
    TensorDType {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Type stored, as the file format spells it.
        actual: String,
    },
    /// Activations were asked for in a type that is not a float.
    #[error("activations cannot be {dtype}, must be f32, f16 or bf16")]
    ActivationDType {
        /// The type asked for.
        dtype: DType,
    },
    /// A field of an adapter's configuration is missing, out of range or not supported.
    #[error("`{}`: adapter field `{field}` = {value}, must be {rule}", path.display())]
    Adapter {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Value found, as JSON; `missing` where there is none.
        value: String,
        /// What is accepted.
        rule: &'static str,
    },
    /// A name asks for adapters on a layer that the model does not have.
    #[error("no linear layer is named `{name}`; the model has: {available}")]
    UnknownTarget {
        /// The name given.
        name: String,
        /// The names that exist, comma-separated.
        available: String,
    },
    /// Adapters were asked for on the head, whose logits are never formed whole.
    #[error("`{name}`: adapters on the head are not supported")]
    HeadTarget {
        /// The name given.
        name: String,
    },
    /// The model has no adapters to write.
    #[error("`{}`: the model has no adapter to save", path.display())]
    NoAdapter {
        /// The folder that was to be written.
        path: PathBuf,
    },
    /// The model has no trained weights to write, or no folder whose configuration they belong to.
    #[error("`{}`: the model has no trained weights of a folder to save", path.display())]
    NothingTrained {
        /// The folder that was to be written.
        path: PathBuf,
    },
    /// An adapter file holds a tensor that belongs to no adapted layer.
    #[error("`{}`: tensor `{name}` does not belong to any targeted layer", path.display())]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
    },
    /// The adapter of a layer is not the one that the configuration of the model's adapters gives it.
    #[error("layer `{name}` has adapter {field} {actual}, the model's adapters have {expected}")]
    MixedAdapters {
        /// Path of the layer.
        name: String,
        /// `rank`, `alpha`, `scale` or `dropout`.
        field: &'static str,
        /// By the configuration.
        expected: f32,
        /// Of this layer.
        actual: f32,
    },
    /// A line of a data file is not usable.
    #[error("`{}`, line {line}: `{field}` {message}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The field.
        field: &'static str,
        /// What is wrong: value and rule.
        message: String,
    },
    /// A line of a data file is not a JSON object of the expected form.
    #[error("`{}`, line {line}, column {column}: {reason}", path.display())]
    DataSyntax {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// Column in bytes from 1.
        column: usize,
        /// What the parser reported, without its own idea of the line.
        reason: String,
    },
    /// A line of a data file has the fields of none of the forms that are read.
    #[error(
        "`{}`, line {line}: no known form of example, found {found}; expected `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, `text`, or `input_ids`",
        path.display()
    )]
    UnknownShape {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The fields that are there, comma-separated.
        found: String,
    },
    /// A chat template is not Jinja, fails on a conversation or refuses it.
    #[error("`{}`, line {line} of chat template `{name}`: {reason}", path.display())]
    ChatTemplate {
        /// The file it stands in.
        path: PathBuf,
        /// Its name, `default` where there is but one.
        name: String,
        /// Line of the template from 1; 0 if unknown.
        line: usize,
        /// What the template says, or what is wrong with it.
        reason: String,
    },
    /// Chats are to be read or continued, and the model has no template for them.
    #[error("the model in `{}` has no chat template, neither chat_template.jinja nor `chat_template` in tokenizer_config.json", model.display())]
    NoChatTemplate {
        /// Folder of the model.
        model: PathBuf,
    },
    /// The conversation of an example could not be rendered.
    #[error("`{}`, line {line}: cannot render the conversation", path.display())]
    Rendering {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What the template reported.
        #[source]
        source: Box<Error>,
    },
    /// Where an answer begins and ends in the rendered text cannot be told.
    #[error(
        "`{}`, line {line}: cannot tell where the answer in message {message} begins and ends, because the chat template renders it otherwise than at the end of a conversation; mark answers with {{% generation %}} in the template, or train on all tokens",
        path.display()
    )]
    AnswerSpan {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The message, from 1.
        message: usize,
    },
    /// A Parquet file is damaged, or written in a way that the reader does not know.
    #[error("`{}`: not a readable Parquet file", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader reported.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A Parquet file, and a build that reads JSONL alone.
    #[error("`{}` is a Parquet file: build with feature `parquet` to read it, or convert it to JSONL", path.display())]
    ParquetNotBuilt {
        /// The file.
        path: PathBuf,
    },
    /// A data file is empty.
    #[error("`{}`: no examples in it", path.display())]
    NoExamples {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in a data file can be learned from.
    #[error("`{}`: none of the {num_examples} examples has a target within its first {max_seq_len} tokens (the first label of an example never counts, -100 means no target)", path.display())]
    NoTargets {
        /// The file.
        path: PathBuf,
        /// Examples in it.
        num_examples: usize,
        /// Limit that examples were cut to, in tokens.
        max_seq_len: usize,
    },
    /// Training met a loss or gradient that is not finite and stopped.
    #[error("training stopped, the adapter as it was after step {last_good_step} is saved in `{}`", output.display())]
    Stopped {
        /// Steps whose effect the saved adapter has; 0 for none.
        last_good_step: usize,
        /// Folder of the adapter.
        output: PathBuf,
        /// The step at fault and its numbers.
        #[source]
        source: Box<unsloth_train::Error>,
    },
    /// The loss over a data set is not a finite number.
    #[error("the loss over the first {num_targets} targets is {loss}")]
    NonFiniteLoss {
        /// Targets summed over when it happened.
        num_targets: usize,
        /// Their mean loss.
        loss: f64,
    },
    /// A setting of a recipe, of loading or of generation is out of its range.
    #[error("{field} = {value}, must be {rule}")]
    InvalidOption {
        /// Name of the setting.
        field: &'static str,
        /// Value given.
        value: String,
        /// What is accepted.
        rule: String,
    },
    /// The model computes NaN: its weights or activations have overflowed.
    #[error("the logits behind token {position} are not numbers")]
    NonFiniteLogits {
        /// Tokens of prompt and generation so far.
        position: usize,
    },
    /// A tokenizer file could not be read or failed on a text.
    #[error("tokenizer `{}` failed", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the library reported.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// An [`Error::Io`] for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Error::Io { action, path: path.to_owned(), source }
    }

    /// An [`Error::Json`] for `map_err`.
    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| Error::Json { path: path.to_owned(), source }
    }
}
