//! What checkpointing saves on a deep model at a long sequence: by the ledger, and by the operating system.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test may panic like the test itself")]

use std::{fs, path::Path};

use serde_json::json;
use unsloth_core::{Category, Device};
use unsloth_cpu::{CpuBackend, CpuOptions};
use unsloth_llm::recipe::{MemoryPlan, Offload, Planner, TrainConfig, plan};

const NUM_LAYERS: usize = 24;
const SEQ_LEN: usize = 2048;

fn write_config(folder: &Path) {
    let config = json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQ_LEN,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true,
        "dtype": "float32",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn config(folder: &Path, policy: &str, offload: Offload) -> TrainConfig {
    let config = TrainConfig::new(folder.to_owned(), Vec::new(), folder.to_owned());
    TrainConfig { checkpointing: policy.parse().unwrap(), offload, max_seq_len: Some(SEQ_LEN), ..config }
}

fn cpu() -> Device {
    Device::new(CpuBackend::new(CpuOptions { num_threads: Some(2), ..CpuOptions::default() }).unwrap())
}

fn activations(found: &MemoryPlan) -> u64 {
    found.usage.peak_bytes[Category::Activations.index()]
}

/// A line of the status of this process, in bytes.
#[cfg(target_os = "linux")]
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

/// Runs two steps on the CPU and gives what the ledger and the operating system saw.
#[cfg(target_os = "linux")]
fn measure(config: &TrainConfig) -> (MemoryPlan, u64) {
    // Forgets the highest memory so far.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let found = plan(&cpu(), config).unwrap();
    (found, status("VmHWM") - before)
}

/// One process, one run after the other: the system's numbers are those of all threads.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "full: minutes of training on a deep model"]
fn a_deep_model_holds_as_much_less_as_it_says() {
    /// What a run holds besides its buffers: idle blocks of the pool, what products of f32 pack, what the allocator keeps.
    const BESIDES: u64 = 64 << 20;
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path());
    let planner = Planner::of(&cpu());
    let mut first = None;
    for (policy, offload, most) in [
        ("none", Offload::None, 1.0),
        ("selective", Offload::None, 0.75),
        ("sqrt", Offload::None, 0.3),
        ("every:1", Offload::None, 0.2),
        ("every:1", Offload::Host, 0.2),
        ("every:1", Offload::Disk, 0.2),
    ] {
        let config = config(folder.path(), policy, offload);
        let (measured, system) = measure(&config);
        let (none, none_system) = *first.get_or_insert((activations(&measured), system));
        let share = activations(&measured) as f64 / none as f64;
        let planned = planner.plan(&config).unwrap();
        assert_eq!(planned.usage, measured.usage, "{policy} {offload}: the plan is exact");
        let elsewhere = measured.elsewhere.map_or(0, |usage| usage.peak_bytes);
        let in_memory = if offload == Offload::Host { elsewhere } else { 0 };
        let ledger = measured.usage.total_peak_bytes() + in_memory;
        println!(
            "{policy} {offload}: activations {} ({:.1}% of none), elsewhere {elsewhere}; ledger {ledger}, system {system}",
            activations(&measured),
            100.0 * share
        );
        assert!(share <= most, "{policy} {offload}: {share}");
        assert!(system <= ledger + ledger / 10 + BESIDES, "{policy} {offload}: system {system}, ledger {ledger}");
        assert!(system + BESIDES + ledger / 10 >= ledger, "{policy} {offload}: system {system}, ledger {ledger}");
        if policy != "none" {
            assert!(system < none_system, "{policy} {offload}: system {system}, {none_system} without");
        }
    }
}
