//! `rms_norm`: see `cases::rms_norm`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("rms_norm")
}
