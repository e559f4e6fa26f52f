//! `decode`: see `cases::decode`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("decode")
}
