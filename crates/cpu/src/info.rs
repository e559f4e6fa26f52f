//! What this processor is, for a list of devices.

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
use unsloth_core::{DType, DeviceInfo, DeviceName};

use crate::team;

/// This processor: its memory is that of the machine.
pub fn info() -> DeviceInfo {
    let wanted =
        RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()).with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(wanted).ok();
    let first = system.as_ref().and_then(|system| system.cpus().first());
    let model = first.map(|cpu| cpu.brand().trim()).filter(|model| !model.is_empty()).unwrap_or("unknown model");
    let memory_bytes = system.as_ref().map(System::total_memory).filter(|&bytes| bytes > 0);
    let mut features = vec![format!("{} threads", team::available())];
    let (there, missing): (Vec<_>, Vec<_>) = instruction_sets().into_iter().partition(|(_, there)| *there);
    let names = |sets: Vec<(&str, bool)>| -> Vec<String> { sets.iter().map(|(name, _)| (*name).to_owned()).collect() };
    features.extend(names(there));
    let (name, model, dtypes) = (DeviceName::Cpu, model.to_owned(), DType::FLOATS.to_vec());
    let (tensor_cores, lacks) = (Vec::new(), names(missing));
    DeviceInfo { name, model, memory_bytes, driver: None, dtypes, tensor_cores, features, lacks }
}

/// Those that the operators make use of, and whether this processor has them.
#[cfg(target_arch = "x86_64")]
fn instruction_sets() -> Vec<(&'static str, bool)> {
    vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("amx", crate::amx::is_available()),
    ]
}

/// Those that the operators make use of, and whether this processor has them.
#[cfg(not(target_arch = "x86_64"))]
fn instruction_sets() -> Vec<(&'static str, bool)> {
    if cfg!(target_arch = "aarch64") { vec![("neon", true)] } else { Vec::new() }
}
