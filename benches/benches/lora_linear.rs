//! `lora_linear`: see `cases::lora_linear`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("lora_linear")
}
