//! `reduce`: see `cases::reduce`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("reduce")
}
