//! `unsloth check-grad`

use std::{io::Write, path::PathBuf};

use anyhow::{Context, Result, bail};
use unsloth_rs::{
    exact,
    recipe::{CheckGradConfig, CheckedGradient, GradientReport, Reference, check_grad},
};

use crate::{args::DeviceArgs, note};

/// Parameters that are shown, the worst.
const SHOWN: usize = 10;

/// Options of `unsloth check-grad`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model: config.json and safetensors, as Hugging Face has them; with feature `hub` also its name there
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter: check what it trains, instead of every weight
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// JSONL file whose first examples are the batch; may be given several times [default: random tokens]
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Tokens of the batch
    #[arg(long, value_name = "N", default_value_t = 32)]
    tokens: usize,
    /// Seed of random tokens and directions
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Largest difference of the device's gradient from that in f64, relative to its largest element
    #[arg(long, value_name = "F", default_value_t = 1e-3)]
    tolerance: f64,
    /// Largest difference of a central difference in f64, relative to a gradient of that length
    #[arg(long, value_name = "F", default_value_t = 1e-4)]
    numeric_tolerance: f64,
    /// Print the report as JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let device = args.device.open()?;
    let config = CheckGradConfig {
        adapter: args.adapter,
        data: args.data,
        num_tokens: args.tokens,
        seed: args.seed,
        tolerance: args.tolerance,
        numeric_tolerance: args.numeric_tolerance,
        ..CheckGradConfig::new(args.model)
    };
    let reference = Reference { device: exact::device(), values: exact::values, set_values: exact::set_values };
    let report = check_grad(&device, &reference, &config, &mut |done, all| {
        if done % 50 == 0 && done < all {
            note(&format!("{done} of {all} parameters checked"));
        }
    })?;
    let text = if args.json { serde_json::to_string(&report)? } else { table(&report, &device.name()) };
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")?;
    let num_all = report.gradients.len();
    match report.gradients.first() {
        Some(worst) if report.num_wrong > 0 => {
            bail!("{} of {num_all} gradients are wrong, the worst that of {}", report.num_wrong, worst.name)
        }
        _ => Ok(()),
    }
}

fn table(report: &GradientReport, device: &str) -> String {
    let (loss, exact) = (report.loss, report.exact_loss);
    let mut text = format!("loss {loss:.7} on {device}, {exact:.12} in f64, over {} targets\n", report.num_targets);
    text += &format!("{:<60} {:>10} {:>10} {:>10}\n", "parameter", "largest", device, "numeric");
    for found in report.gradients.iter().take(SHOWN) {
        let CheckedGradient { name, largest, difference, numeric_difference, .. } = found;
        let numeric = numeric_difference.map_or_else(|| "-".to_owned(), |difference| format!("{difference:.1e}"));
        text += &format!("{name:<60} {largest:>10.1e} {difference:>10.1e} {numeric:>10}\n");
    }
    let num_all = report.gradients.len();
    if num_all > SHOWN {
        text += &format!("and {} more, no worse\n", num_all - SHOWN);
    }
    text + &format!("{} of {num_all} gradients are within the tolerances", num_all - report.num_wrong)
}
