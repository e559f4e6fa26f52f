//! What a run trains on and is evaluated on.

use unsloth_train::{Batch, Document, Model};

use crate::{
    Result,
    config::DecoderConfig,
    dataset::{Dataset, ReadOptions, Sample},
    decoder::Decoder,
    packing::{self, BatchOptions, Batches, Step},
    recipe::{EvalReport, EvalSource, TrainConfig},
    tokenizer::Tokenizer,
};

/// Everything that is read before the first step.
pub(super) struct Data {
    pub(super) train: Dataset,
    /// Of the documents to train on.
    pub(super) sha256: String,
    pub(super) eval: Option<EvalData>,
    pub(super) sample: Option<Sample>,
    pub(super) batching: BatchOptions,
}

/// Documents to evaluate on.
pub(super) struct EvalData {
    pub(super) dataset: Dataset,
    /// Documents that are computed at once, in the order of the data: no more tokens than a micro-batch.
    pub(super) groups: Vec<Vec<usize>>,
    pub(super) report: EvalReport,
}

impl Data {
    pub(super) fn read(config: &TrainConfig, model: &DecoderConfig) -> Result<Self> {
        let max_seq_len = crate::recipe::max_seq_len(config.max_seq_len, model);
        let options =
            ReadOptions { model: &config.model, vocab_size: model.vocab_size, max_seq_len, train_on: config.train_on };
        let batching = config.batch_options(max_seq_len);
        let whole = Dataset::read(&config.data, options)?;
        let (train, eval) = match &config.eval {
            None => (whole, None),
            Some(EvalSource::Files(files)) => (whole, Some(Dataset::read(files, options)?)),
            Some(EvalSource::Split(share)) => {
                let (train, held_out) = whole.split(*share, config.seed)?;
                (train, Some(held_out))
            }
        };
        let tokenizer = Tokenizer::exists(&config.model).then(|| Tokenizer::load(&config.model)).transpose()?;
        let sample = tokenizer.map(|tokenizer| train.sample(&tokenizer)).transpose()?;
        let eval = eval.map(|dataset| EvalData::new(dataset, &train, batching));
        Ok(Self { sha256: train.sha256(), train, eval, sample, batching })
    }

    /// The shape of the micro-batch with most tokens among those of the first steps: the length of a sequence, and sequences.
    pub(super) fn largest_micro_batch(&self, mut batches: Batches, num_steps: usize) -> (usize, usize) {
        let lengths = self.train.lengths();
        let tokens = |documents: &Vec<usize>| documents.iter().map(|&document| lengths[document]).sum::<usize>();
        // Further epochs pack the same documents in another order.
        let steps = num_steps.min(lengths.len());
        let most = (0..steps).flat_map(|_| batches.next_step()).map(|documents| tokens(&documents)).max().unwrap_or(0);
        let batch_size = self.batching.batch_size.min(lengths.len());
        (most.div_ceil(batch_size).max(2), batch_size)
    }

    /// The micro-batches of a step.
    pub(super) fn micro_batches(&self, model: &Decoder, step: Step) -> Result<Vec<Batch>> {
        let batch = |documents: Vec<usize>| {
            let documents: Vec<Document<'_>> = documents.into_iter().map(|index| self.train.document(index)).collect();
            Ok(Batch::new(model.device(), &documents)?)
        };
        step.into_iter().map(batch).collect()
    }
}

impl EvalData {
    fn new(dataset: Dataset, train: &Dataset, batching: BatchOptions) -> Self {
        let report = EvalReport { data: dataset.report(), num_trained_on: dataset.num_shared_with(train) };
        let order: Vec<usize> = (0..dataset.num_documents()).collect();
        let sequences = packing::pack(&dataset.lengths(), &order, batching.max_seq_len);
        let groups = sequences.chunks(batching.batch_size).map(<[_]>::concat).collect();
        Self { dataset, groups, report }
    }
}
