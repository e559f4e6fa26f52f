//! A whole run: limits, then every case checked and timed in turn with its peers.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use unsloth_rs::{
    DType, Device, Error,
    cpu::{CpuBackend, CpuOptions},
};

use crate::{
    case::{Case, Context, Prepared},
    cases::{GROUPS, Selection},
    criterion::once,
    limits::{self, Bound, Limits, Products, Rate},
    machine::{self, Machine, Noise},
    measure::{Contender, Effort, Eviction, InProcess, Timing, in_turn},
    models::MODELS,
    recorder::recorded,
    report::{Entry, NotRun, PeerTiming, Report, ThreadLimits, VERSION},
    torch::{Task, Torch},
};

/// Tokens of a micro-batch on the processor, and on a device: there every matrix of activations is to be larger than caches.
const TOKENS: [usize; 2] = [1024, 8192];

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Device, as the command line spells it.
    pub device: String,
    /// Storage types; none: f32 and bf16, or f16 on a device without bf16.
    pub dtypes: Vec<DType>,
    /// Numbers of threads; none: all. Only for the processor.
    pub threads: Vec<usize>,
    /// Groups of [`GROUPS`]; none: all.
    pub ops: Vec<String>,
    /// Names of [`MODELS`]; none: all.
    pub shapes: Vec<String>,
    /// Lengths of one sequence, for attention and training steps; none: those of the selection.
    pub seq_lens: Vec<usize>,
    /// A Hugging Face folder to train and decode.
    pub folder: Option<PathBuf>,
    /// The smallest model and few samples.
    pub quick: bool,
    /// Nothing begins once this has passed, and the report says what was left out.
    pub time_limit: Option<Duration>,
    /// The Python that has PyTorch, if it is to be a peer.
    pub python: Option<PathBuf>,
    /// The command, for the report.
    pub command: String,
}

/// A report, and what went wrong on the way.
pub struct Outcome {
    /// What was found.
    pub report: Report,
    /// Results that were wrong, and calls that failed for another reason than a lack of memory or of support.
    pub failures: Vec<String>,
}

impl Options {
    /// # Errors
    /// For a group or a model that does not exist, models beside `quick`, or threads where they mean nothing.
    pub fn validate(&self) -> Result<()> {
        let known: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
        if let Some(op) = self.ops.iter().find(|op| !known.contains(&op.as_str())) {
            bail!("--op {op}: must be one of {}", known.join(", "));
        }
        let known = MODELS.map(|model| model.name);
        if let Some(shape) = self.shapes.iter().find(|shape| !known.contains(&shape.as_str())) {
            bail!("--shape {shape}: must be one of {}", known.join(", "));
        }
        ensure!(!self.quick || self.shapes.is_empty(), "--shape: --quick is about the smallest model");
        ensure!(self.threads.is_empty() || self.device == "cpu", "--threads: {} has none to choose", self.device);
        ensure!(!self.threads.contains(&0), "--threads 0: must be at least 1");
        ensure!(!self.quick || self.seq_lens.is_empty(), "--seq: --quick has its own lengths");
        if let Some(len) = self.seq_lens.iter().find(|&&len| len < 2) {
            bail!("--seq {len}: must be at least 2: a token and its target");
        }
        Ok(())
    }

    fn open(&self, threads: usize) -> Result<Device> {
        if self.device != "cpu" {
            return Ok(unsloth_rs::device(&self.device)?);
        }
        let options = CpuOptions { num_threads: Some(threads), ..CpuOptions::default() };
        Ok(Device::new(CpuBackend::new(options)?))
    }

    /// The types that the device has, and what is missing of those asked for.
    fn dtypes(&self, device: &Device) -> (Vec<DType>, Vec<NotRun>) {
        let wanted = if self.dtypes.is_empty() {
            let half = if device.supports(DType::BF16) { DType::BF16 } else { DType::F16 };
            vec![DType::F32, half]
        } else {
            self.dtypes.clone()
        };
        let (there, missing): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|&dtype| device.supports(dtype));
        let not_run = |dtype: DType| NotRun::new(dtype.name(), format!("{} does not have it", device.name()));
        (there, missing.into_iter().map(not_run).collect())
    }

    fn selection(&self, dtypes: Vec<DType>) -> Selection {
        let tokens = TOKENS[usize::from(self.device != "cpu")];
        let mut selection = if self.quick { Selection::quick(dtypes) } else { Selection::full(dtypes, tokens) };
        if !self.shapes.is_empty() {
            selection.models.retain(|model| self.shapes.iter().any(|shape| shape == model.name));
        }
        if !self.seq_lens.is_empty() {
            selection.seq_lens.clone_from(&self.seq_lens);
            selection.step_lens.clone_from(&self.seq_lens);
            selection.all_lens = true;
        }
        Selection { folder: self.folder.clone(), ..selection }
    }

    fn effort(&self, device: &Device) -> Effort {
        match (self.quick, machine::is_cpu(device)) {
            (true, _) => Effort::QUICK,
            (false, true) => Effort::FULL,
            (false, false) => Effort::DEVICE,
        }
    }

    /// Numbers of threads, the last one that of the main results.
    fn thread_counts(&self) -> Vec<usize> {
        if self.device != "cpu" {
            return vec![1];
        }
        if !self.threads.is_empty() {
            return self.threads.clone();
        }
        let all = machine::cpus();
        let fewer = (0..).map(|power| 1 << power).take_while(|&threads| threads < all);
        if self.quick { vec![all] } else { fewer.chain([all]).collect() }
    }
}

/// Runs it, telling of each result as it comes.
///
/// # Errors
/// Options that are refused; a device that does not open; limits that cannot be measured.
pub fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Outcome> {
    options.validate()?;
    let (noise, start) = (Noise::start(), Instant::now());
    let counts = options.thread_counts();
    let main = *counts.last().context("at least one number of threads")?;
    let device = options.open(main)?;
    let machine = Machine::of(&device);
    tell(&format!("{}: {}", machine.device, machine.model));
    let mut not_run = Vec::new();
    let torch = peer(options, main, &mut not_run);
    let (dtypes, missing) = options.dtypes(&device);
    not_run.extend(missing);
    not_run.extend(left_out(options));
    let candle = format!("candle {}, in this process", machine::library_version("candle-core").unwrap_or("?"));
    let peers = machine::is_cpu(&device).then_some(candle);
    let peers = peers.into_iter().chain(torch.iter().map(|torch| torch.borrow().version.clone())).collect();
    let report = Report {
        version: VERSION,
        command: options.command.clone(),
        commit: machine::commit(),
        peers,
        machine,
        used_by_others: None,
        limits: Vec::new(),
        results: Vec::new(),
        not_run,
    };
    drop(device);
    let mut session = Session { options, start, main, torch, eviction: Eviction::new(), report, failures: Vec::new() };
    for &threads in &counts {
        session.with_threads(threads, &options.selection(dtypes.clone()), tell)?;
    }
    session.report.used_by_others = noise.share();
    Ok(Outcome { report: session.report, failures: session.failures })
}

fn peer(options: &Options, threads: usize, not_run: &mut Vec<NotRun>) -> Option<RefCell<Torch>> {
    let Some(python) = &options.python else {
        not_run.push(NotRun::new("PyTorch", "--peer torch asks for it"));
        return None;
    };
    let torch = Torch::start(python, &options.device, threads);
    torch.inspect_err(|error| not_run.push(NotRun::new("PyTorch", format!("{error:#}")))).ok().map(RefCell::new)
}

/// What this run leaves out by its options or its build.
fn left_out(options: &Options) -> Vec<NotRun> {
    let mut left_out: Vec<NotRun> =
        machine::not_built().into_iter().map(|(what, reason)| NotRun::new(what, reason)).collect();
    let here = machine::devices().into_iter().map(|info| info.name.to_string());
    let others = here.filter(|name| *name != options.device);
    left_out.extend(others.map(|name| NotRun::new(format!("device {name}"), format!("--device {name}"))));
    if options.quick {
        let full = Selection::full(vec![], TOKENS[0]);
        let models: Vec<&str> = full.models.iter().skip(1).map(|model| model.name).collect();
        left_out.push(NotRun::new(models.join(", "), "--quick"));
        left_out.push(NotRun::new(
            "micro-batches above 512 tokens, sequences above 1024, fewer threads, all calls of an operator, candle's whole steps",
            "--quick",
        ));
    }
    if !options.shapes.is_empty() {
        left_out.push(NotRun::new("all other models", format!("--shape {}", options.shapes.join(" --shape "))));
    }
    if !options.seq_lens.is_empty() {
        let lens: Vec<String> = options.seq_lens.iter().map(usize::to_string).collect();
        left_out.push(NotRun::new("all other lengths of a sequence", format!("--seq {}", lens.join(","))));
    }
    if !options.ops.is_empty() {
        left_out.push(NotRun::new("all other operators", format!("--op {}", options.ops.join(" --op "))));
    }
    left_out
}

struct Session<'a> {
    options: &'a Options,
    start: Instant,
    /// Threads of the main results.
    main: usize,
    torch: Option<RefCell<Torch>>,
    eviction: Eviction,
    report: Report,
    failures: Vec<String>,
}

/// What tells how time falls with the number of threads.
const SCALING: [&str; 3] = ["linear", "attention", "train_step"];

impl Session<'_> {
    /// All cases; with fewer threads than the main results have, only those that [`SCALING`] is about.
    fn with_threads(&mut self, threads: usize, selection: &Selection, tell: &mut dyn FnMut(&str)) -> Result<()> {
        let (device, recording) = recorded(&self.options.open(threads)?);
        let (limits, products) = self.limits(&device, threads)?;
        tell(&format!("limits with {threads} threads: {limits}"));
        self.report.limits.push(ThreadLimits { threads, limits: limits.clone() });
        let is_main = threads == self.main || !self.options.threads.is_empty();
        let of_fewer = |lens: &[usize]| if selection.all_lens { lens.to_vec() } else { vec![1024] };
        let smaller = Selection {
            models: selection.models[..1].to_vec(),
            seq_lens: of_fewer(&selection.seq_lens),
            step_lens: of_fewer(&selection.step_lens),
            all_calls: false,
            ..selection.clone()
        };
        let context = Context { device: &device, recording: &recording, with_candle: machine::is_cpu(&device) };
        for (name, cases) in GROUPS {
            let is_wanted = self.options.ops.is_empty() || self.options.ops.iter().any(|op| op == name);
            if !is_wanted || !(is_main || SCALING.contains(&name)) {
                continue;
            }
            for case in cases(if is_main { selection } else { &smaller }) {
                if self.options.time_limit.is_some_and(|limit| self.start.elapsed() > limit) {
                    self.report.not_run.push(NotRun::new(case.id.to_string(), "--time-limit"));
                    continue;
                }
                match self.case(&case, (context, threads), (&limits, products.as_ref())) {
                    Ok(entry) => {
                        tell(&entry.to_string());
                        self.report.results.push(entry);
                    }
                    Err(error) => self.fail(&case, &error, tell),
                }
            }
        }
        Ok(())
    }

    fn fail(&mut self, case: &Case, error: &anyhow::Error, tell: &mut dyn FnMut(&str)) {
        let reason = format!("{error:#}");
        tell(&format!("not run: {} ({reason})", case.id));
        let is_expected = matches!(
            error.downcast_ref::<Error>(),
            Some(Error::OutOfMemory { .. } | Error::Unsupported { .. } | Error::UnsupportedDType { .. })
        );
        if !is_expected {
            self.failures.push(format!("{}: {reason}", case.id));
        }
        self.report.not_run.push(NotRun::new(case.id.to_string(), reason));
    }

    /// The limits, and how to measure those of a processor's products again.
    fn limits(&mut self, device: &Device, threads: usize) -> Result<(Limits, Option<Products>)> {
        // Others disturb a processor more than a card.
        let time = Duration::from_millis(if self.options.quick || !machine::is_cpu(device) { 400 } else { 2000 });
        if machine::is_cpu(device) {
            let (limits, products) = limits::cpu(threads, time, machine::beyond_caches());
            return Ok((limits, Some(products)));
        }
        let size = if self.options.quick { (2048, 64 << 20) } else { (4096, 256 << 20) };
        let mut limits = limits::device(device, time, size)?;
        // The vendor's library may be faster than this one: then it is the limit.
        let rates = [
            (DType::F32, Some(&mut limits.f32_flops)),
            (DType::BF16, limits.bf16_flops.as_mut()),
            (DType::F16, limits.f16_flops.as_mut()),
        ];
        for (dtype, rate) in rates {
            if let (Some(rate), Some(torch)) = (rate, &self.torch)
                && let Ok(theirs) = torch_product(torch, size.0, dtype)
                && theirs.per_second > rate.per_second
            {
                *rate = theirs;
            }
        }
        Ok((limits, None))
    }

    fn case(
        &mut self,
        case: &Case,
        (context, threads): (Context<'_>, usize),
        (limits, products): (&Limits, Option<&Products>),
    ) -> Result<Entry> {
        let Prepared { mut check, mut run, candle, torch } = case.prepare(&context)?;
        check()?;
        drop(check);
        let device = context.device;
        let before = device.usage().total_live_bytes();
        let marked = machine::reset_process_peak();
        device.backend().reset_peak();
        let cost = context.recording.cost_of(|| once(&mut run).map(drop))?;
        let peak_bytes = device.usage().total_peak_bytes();
        let peak_rss_bytes = machine::process_bytes("VmHWM").filter(|_| marked);

        let mut names = Vec::new();
        let mut contenders: Vec<Box<dyn Contender + '_>> = Vec::new();
        contenders.push(Box::new(match machine::is_cpu(device) {
            true => InProcess::on_cpu(run, &self.eviction),
            false => InProcess::on_device(run, device)?,
        }));
        // candle takes all threads of the process.
        if let Some(candle) = candle.filter(|_| threads == machine::cpus()) {
            let mut candle = InProcess::on_cpu(candle, &self.eviction);
            candle.sample()?;
            names.push("candle".to_owned());
            contenders.push(Box::new(candle));
        }
        if let Some(peer) = self.torch.as_ref().filter(|_| threads == self.main) {
            for (name, task) in Task::prepare_all(peer, &torch)? {
                match task {
                    Ok(task) => {
                        names.push(name.to_owned());
                        contenders.push(Box::new(task));
                    }
                    Err(error) => {
                        self.report.not_run.push(NotRun::new(format!("{name}: {}", case.id), format!("{error:#}")));
                    }
                }
            }
        }
        let dtype = DType::FLOATS.into_iter().find(|dtype| dtype.name() == case.id.dtype).unwrap_or(DType::F32);
        let (mut least, bound) = limits.least_time(cost, dtype);
        let products = products.filter(|_| bound == Bound::Compute);
        if let Some(products) = products {
            contenders.push(Box::new(Limit { products, dtype, flops: cost.flops as f64 }));
        }
        let mut timings = in_turn(&mut contenders, self.options.effort(device))?;
        drop(contenders);
        if products.is_some() {
            let limit = timings.pop().context("the limit has times")?;
            least = Duration::from_secs_f64(limit.median_s);
        }
        let mut timings = timings.into_iter();
        let timing = timings.next().context("a case has its own times")?;
        let peer = |(name, theirs): (String, Timing)| {
            let ratio = theirs.median_s / timing.median_s;
            PeerTiming { name, timing: theirs, ratio }
        };
        let peers = names.into_iter().zip(timings).map(peer).collect();
        Ok(Entry {
            id: case.id.clone(),
            threads,
            flops: cost.flops,
            bytes: cost.bytes(),
            bound,
            percent_of_limit: 100.0 * least.as_secs_f64() / timing.median_s,
            limit_flops: products.map(|_| cost.flops as f64 / least.as_secs_f64()),
            peak_bytes,
            extra_bytes: peak_bytes.saturating_sub(before),
            peak_rss_bytes,
            tokens_per_second: case.tokens.map(|tokens| tokens as f64 / timing.median_s),
            timing,
            peers,
        })
    }
}

/// The least time for a number of FLOPs, measured in turn with those that need longer: a processor's rate of products is not the same
/// throughout a run.
struct Limit<'a> {
    products: &'a Products,
    dtype: DType,
    flops: f64,
}

impl Contender for Limit<'_> {
    fn sample(&mut self) -> Result<f64> {
        Ok(self.products.time(self.dtype, self.flops).as_secs_f64())
    }
}

/// The rate of a square product by PyTorch.
fn torch_product(torch: &RefCell<Torch>, size: usize, dtype: DType) -> Result<Rate> {
    torch.borrow_mut().clear()?;
    let task = json!({ "op": "linear", "part": "forward", "rows": size, "in_features": size,
        "out_features": size, "dtype": dtype.name() });
    let mut peer = Task::prepare(torch, "torch", &task)?;
    let times: Vec<f64> = (0..5).map(|_| peer.sample()).collect::<Result<_>>()?;
    let best = times.into_iter().fold(f64::INFINITY, f64::min);
    Ok(Rate {
        per_second: 2.0 * (size as f64).powi(3) / best,
        by: format!("PyTorch's product of {size} x {size} {dtype}"),
    })
}

/// Writes the report and its plots into a folder.
///
/// # Errors
/// If the folder cannot be written.
pub fn write(report: &Report, folder: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let json = folder.join("bench.json");
    std::fs::write(&json, format!("{}\n", serde_json::to_string_pretty(report)?))?;
    let mut written = vec![json];
    for (name, svg) in crate::plots::draw(report)? {
        let path = folder.join(name);
        std::fs::write(&path, svg)?;
        written.push(path);
    }
    Ok(written)
}
