//! PyTorch as a peer: `benches/peers/torch_peer.py` in a process of its own, asked for one sample at a time.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::measure::Contender;

/// A running peer.
pub struct Torch {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// As in `PyTorch 2.9.1, 2 threads`.
    pub version: String,
}

/// Where the peer's program lies: beside the sources, or beside this program where that is a copy without them.
fn script() -> Result<PathBuf> {
    let in_tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/torch_peer.py");
    let beside = std::env::current_exe()?.with_file_name("torch_peer.py");
    let found = [in_tree, beside].into_iter().find(|path| path.is_file());
    found.context("torch_peer.py is neither in benches/peers nor beside the program")
}

impl Torch {
    /// Starts the peer with this Python on the same device, with as many threads.
    ///
    /// # Errors
    /// If Python, PyTorch or the device is missing: what it said.
    pub fn start(python: &Path, device: &str, threads: usize) -> Result<Self> {
        if !(device == "cpu" || device.starts_with("cuda")) {
            bail!("PyTorch does not run on {device}");
        }
        let (device, threads) = (["--device", device], threads.to_string());
        let mut command = Command::new(python);
        command.args(["-W", "ignore"]).arg(script()?).args(device).args(["--threads", &threads]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", python.display()))?;
        let (to, from, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let mut from = BufReader::new(from.context("the peer has no standard output")?);
        let mut line = String::new();
        from.read_line(&mut line)?;
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            child.wait()?;
            let said = stderr.map(std::io::read_to_string).transpose()?.unwrap_or_default();
            bail!("{}", said.lines().last().unwrap_or("the peer said nothing"));
        };
        // Warnings of libraries would fill the pipe.
        if let Some(stderr) = stderr {
            std::thread::spawn(move || BufReader::new(stderr).lines().for_each(drop));
        }
        let version = format!("PyTorch {}, {} threads", ready["torch"].as_str().unwrap_or("?"), ready["threads"]);
        Ok(Self { child, to, from, version })
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let to = self.to.as_mut().context("the peer has ended")?;
        writeln!(to, "{request}")?;
        to.flush()?;
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line).context("the peer ended without an answer")?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }

    /// Forgets all tasks.
    ///
    /// # Errors
    /// If the peer has ended.
    pub fn clear(&mut self) -> Result<()> {
        self.ask(&json!({ "cmd": "clear" })).map(drop)
    }
}

/// A task that is ready, one of several.
pub struct Task<'a> {
    torch: &'a RefCell<Torch>,
    name: String,
}

impl<'a> Task<'a> {
    /// Gets tasks ready that are named, after forgetting all others; those that PyTorch refuses are errors.
    ///
    /// # Errors
    /// If the peer has ended.
    pub fn prepare_all<'n>(
        torch: &'a RefCell<Torch>,
        tasks: &[(&'n str, Value)],
    ) -> Result<Vec<(&'n str, Result<Self>)>> {
        torch.borrow_mut().clear()?;
        Ok(tasks.iter().map(|(name, task)| (*name, Self::prepare(torch, name, task))).collect())
    }

    /// Gets a task ready, under a name of its own.
    ///
    /// # Errors
    /// What PyTorch refuses.
    pub fn prepare(torch: &'a RefCell<Torch>, name: &str, task: &Value) -> Result<Self> {
        torch.borrow_mut().ask(&json!({ "cmd": "prepare", "name": name, "task": task }))?;
        Ok(Self { torch, name: name.to_owned() })
    }
}

impl Contender for Task<'_> {
    fn sample(&mut self) -> Result<f64> {
        let answer = self.torch.borrow_mut().ask(&json!({ "cmd": "sample", "name": self.name }))?;
        answer["seconds"].as_f64().context("the peer gave no time")
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        self.to = None;
        let _ = self.child.wait();
    }
}
