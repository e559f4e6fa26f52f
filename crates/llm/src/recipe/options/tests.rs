//! Options that survive the file they are written to.

use unsloth_train::{AdafactorConfig, AdamWConfig, AdjustLr, LionConfig, MuonConfig, OptimizerConfig, SgdConfig};

use super::*;

fn every_option() -> TrainConfig {
    TrainConfig {
        method: Method::Full,
        adapter: Some("/adapter".into()),
        dtype: DType::BF16,
        seed: u64::MAX >> 1,
        adapters: AdapterSettings {
            rank: Some(3),
            alpha: Some(0.1),
            dropout: Some(0.3),
            rslora: Some(true),
            dora: Some(true),
            lora_init: Some("pissa_niter_4".parse().unwrap()),
            targets: Some("q_proj,v_proj".parse().unwrap()),
            layers_to_transform: Some(vec![0, 2]),
            rank_pattern: Some(vec![("layers.[01].*=q".parse().unwrap(), 5), ("k_proj".parse().unwrap(), 6)]),
            alpha_pattern: Some(vec![("v_proj".parse().unwrap(), 0.7)]),
            modules_to_save: Some(SavedModule::ALL.to_vec()),
            bias: Some("lora_only".parse().unwrap()),
        },
        train_on: Some("all".parse().unwrap()),
        max_seq_len: Some(77),
        packing: false,
        shuffle: false,
        length: RunLength::Steps(9),
        batch_size: 2,
        grad_accum: 3,
        learning_rate: 0.3,
        schedule: ScheduleKind::Linear,
        warmup: Warmup::Steps(4),
        embedding_learning_rate: Some(0.1),
        loraplus_lr_ratio: Some(16.0),
        optimizer: AdamWConfig { beta1: 0.1, beta2: 0.2, eps: 1e-30, weight_decay: 0.7 }.into(),
        max_grad_norm: None,
        checkpointing: "every:3".parse().unwrap(),
        mlp_tile: Some(512),
        offload: Offload::Disk,
        offload_optimizer: Offload::Host,
        memory_bytes: Some(12 << 30),
        trace_nan: true,
        start: Start::New,
        save_every: Some(5),
        keep_last: 6,
        keep_best: true,
        eval: Some(EvalSource::Files(vec!["/e1".into(), "/e2".into()])),
        eval_every: Some(7),
        ..TrainConfig::new("/m".into(), vec!["/d1".into(), "/d2".into()], "/o".into())
    }
}

#[test]
fn a_configuration_survives_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    let defaults = TrainConfig::new("/m".into(), vec!["/d".into()], "/o".into());
    let split = TrainConfig { eval: Some(EvalSource::Split(0.25)), ..defaults.clone() };
    let polynomial = TrainConfig {
        schedule: ScheduleKind::Polynomial,
        end_learning_rate: 0.1,
        power: 3.0,
        optimizer: OptimizerConfig::Sgd(SgdConfig { momentum: 0.3, nesterov: true, weight_decay: 0.2 }),
        ..defaults.clone()
    };
    let wsd = TrainConfig {
        schedule: ScheduleKind::Wsd,
        decay_steps: Some(7),
        optimizer: OptimizerConfig::Lion(LionConfig { beta1: 0.3, beta2: 0.4, weight_decay: 0.5 }),
        ..defaults.clone()
    };
    let small = TrainConfig { optimizer: OptimizerKind::AdamW8bit.with_defaults(), ..defaults.clone() };
    let adafactor = OptimizerConfig::Adafactor(AdafactorConfig { scale_parameter: true, weight_decay: 0.3 });
    let factored = TrainConfig { optimizer: adafactor, ..defaults.clone() };
    let adamw = AdamWConfig { beta1: 0.3, beta2: 0.4, eps: 0.5, weight_decay: 0.6 };
    let muon = MuonConfig { momentum: 0.7, nesterov: false, adjust_lr: AdjustLr::MatchRmsAdamw, adamw };
    let orthogonal = TrainConfig { optimizer: OptimizerConfig::Muon(muon), ..defaults.clone() };
    let (method, dtype, stochastic_rounding) = (Method::Full, DType::BF16, true);
    let pure = TrainConfig { method, dtype, stochastic_rounding, ..defaults.clone() };
    for config in [every_option(), defaults, split, polynomial, wsd, small, factored, orthogonal, pure] {
        std::fs::write(&path, TrainOptions::of(&config, "cpu").to_toml().unwrap()).unwrap();
        let read = TrainOptions::read(&path).unwrap();
        assert_eq!(read, TrainOptions::of(&config, "cpu"));
        assert_eq!(read.config().unwrap(), config);
    }
}

#[test]
fn numbers_are_written_as_they_were_typed() {
    let text = TrainOptions::of(&every_option(), "cpu").to_toml().unwrap();
    for line in [
        "alpha = 0.1\n",
        "dropout = 0.3\n",
        "rslora = true\n",
        "beta2 = 0.2\n",
        "max_grad_norm = inf\n",
        "device = \"cpu\"\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn own_options_win_and_replace_their_alternative() {
    let base = TrainOptions {
        steps: Some(3),
        warmup_ratio: Some(0.5),
        seed: Some(1),
        rank: Some(2),
        ..TrainOptions::default()
    };
    let own = TrainOptions { epochs: Some(2.0), warmup_ratio: Some(0.1), rank: Some(5), ..TrainOptions::default() };
    let merged = own.or(&base).unwrap();
    let expected = TrainOptions { seed: Some(1), ..own.clone() };
    assert_eq!(merged, expected);
    assert_eq!(TrainOptions::default().or(&base).unwrap(), base);
}

#[test]
fn what_is_not_an_option_is_refused_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    for (text, parts) in [
        ("model = \"m\"\nlearning_rat = 1\n", ["line 2", "unknown field `learning_rat`"]),
        ("\n\nsteps = \"many\"\n", ["line 3", "invalid type: string \"many\""]),
        ("steps = -3\n", ["line 1", "invalid value"]),
        ("seed = \n", ["line 1", ""]),
        ("schedule = \"saw\"\n", ["line 1", "unknown variant `saw`"]),
        ("steps = 1\nepochs = 2\n", ["`steps`", "`epochs`"]),
        ("resume = true\noverwrite = true\n", ["`resume`", "`overwrite`"]),
    ] {
        std::fs::write(&path, text).unwrap();
        let message = TrainOptions::read(&path).unwrap_err().to_string();
        for part in parts.into_iter().chain(["run.toml`"]) {
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}

#[test]
fn names_and_missing_paths_are_checked() {
    let whole = TrainOptions::of(&every_option(), "cpu");
    type Spoil = fn(&mut TrainOptions);
    let cases: [(&str, Spoil); 12] = [
        ("model = missing", |o| o.model = None),
        ("data = missing", |o| o.data = None),
        ("output = missing", |o| o.output = None),
        ("dtype = i8", |o| o.dtype = Some("i8".into())),
        ("targets = `a,`", |o| o.targets = Some(OneOrMany::Many(vec!["a".into(), String::new()]))),
        ("lora_init = x", |o| o.lora_init = Some("x".into())),
        ("rank_pattern = `q_proj`", |o| o.rank_pattern = Some(OneOrMany::One("q_proj".into()))),
        ("modules_to_save = `norm`", |o| o.modules_to_save = Some(OneOrMany::One("norm".into()))),
        ("bias = some", |o| o.bias = Some("some".into())),
        ("train_on = x", |o| o.train_on = Some("x".into())),
        ("checkpointing = x", |o| o.checkpointing = Some("x".into())),
        ("memory: bytes = `x`", |o| o.memory = Some("x".into())),
    ];
    for (start, spoil) in cases {
        let mut options = whole.clone();
        spoil(&mut options);
        let message = options.config().unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
}

#[test]
fn a_difference_is_named() {
    let one = TrainOptions { seed: Some(1), rank: Some(2), ..TrainOptions::default() };
    let other = TrainOptions { seed: Some(1), rank: Some(3), steps: Some(4), ..TrainOptions::default() };
    let found = one.difference(&other, &["steps"]).unwrap();
    assert_eq!(found, Some(Difference { option: "rank".into(), own: "2".into(), other: "3".into() }));
    let found = one.difference(&other, &["rank"]).unwrap();
    assert_eq!(found, Some(Difference { option: "steps".into(), own: "absent".into(), other: "4".into() }));
    assert_eq!(one.difference(&other, &["steps", "rank"]).unwrap(), None);
}
