//! What [`unsloth_core::ops::rope_table`] has to show: the frequencies of transformers, and tables of them on a device.

use unsloth_core::{
    DType, Device,
    ops::rope_table::{RopeSpec, Scaling},
};

use crate::{
    data,
    expect::{self, Rejects},
    report::{self, Case, Checked},
};

const OP: &str = "rope_table";

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for golden in GOLDENS {
        let case = Case::new(device, OP, format!("{:?}", golden.spec));
        golden.check(device, &case).map_err(|failure| failure.within(&case))?;
    }
    let case = Case::new(device, OP, "rejects_fields");
    rejects_fields(device, &case).map_err(|failure| failure.within(&case))
}

struct Golden {
    spec: RopeSpec,
    frequencies: &'static [f64],
    factor: f64,
}

/// From `transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")` of transformers 5.23.0, where `config` is
/// a `LlamaConfig(head_dim, rope_theta, rope_scaling)` of the same numbers; it computes in f32. `Default` is
/// `1 / theta^(2i / head_dim)`, worked by hand.
const GOLDENS: [Golden; 6] = [
    Golden {
        spec: RopeSpec { head_dim: 8, theta: 10_000.0, scaling: Scaling::Default },
        frequencies: &[1.0, 0.1, 0.01, 0.001],
        factor: 1.0,
    },
    Golden {
        spec: RopeSpec { head_dim: 8, theta: 10_000.0, scaling: Scaling::Linear { factor: 4.0 } },
        frequencies: &[0.25, 0.025, 0.0025, 0.00025],
        factor: 1.0,
    },
    // Llama 3.1: three channels kept, one between, the rest divided by 8.
    Golden {
        spec: RopeSpec {
            head_dim: 16,
            theta: 500_000.0,
            scaling: Scaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
        },
        frequencies: &[
            1.0,
            0.193_922_758_102_417,
            0.037_606_030_702_590_94,
            0.007_292_665_075_510_74,
            0.000_524_846_022_017_300_1,
            3.428_102_354_519_069e-5,
            6.647_869_668_086_059e-6,
            1.289_173_155_782_919e-6,
        ],
        factor: 1.0,
    },
    Golden {
        spec: RopeSpec {
            head_dim: 16,
            theta: 10_000.0,
            scaling: Scaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 512,
            },
        },
        frequencies: &[
            1.0,
            0.316_227_763_891_220_1,
            0.100_000_001_490_116_12,
            0.017_090_307_548_642_16,
            0.000_312_499_993_015_080_7,
            9.882_118_320_092_559e-5,
            3.125_000_148_429_535e-5,
            9.882_118_320_092_559e-6,
        ],
        factor: 1.0,
    },
    Golden {
        spec: RopeSpec {
            head_dim: 16,
            theta: 10_000.0,
            scaling: Scaling::Yarn {
                factor: 4.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_max_position_embeddings: 512,
                attention_factor: 1.138_629_436_111_989,
                truncate: true,
            },
        },
        frequencies: &[
            1.0,
            0.256_935_060_024_261_5,
            0.0625,
            0.013_834_965_415_298_939,
            0.002_5,
            0.000_790_569_465_607_404_7,
            0.000_25,
            7.905_694_656_074_047e-5,
        ],
        factor: 1.138_629_436_111_989,
    },
    Golden {
        spec: RopeSpec {
            head_dim: 16,
            theta: 10_000.0,
            scaling: Scaling::Yarn {
                factor: 4.0,
                beta_fast: 16.0,
                beta_slow: 2.0,
                original_max_position_embeddings: 512,
                attention_factor: 1.25,
                truncate: false,
            },
        },
        frequencies: &[
            1.0,
            0.316_227_763_891_220_1,
            0.075_664_401_054_382_32,
            0.010_796_109_214_425_087,
            0.002_5,
            0.000_790_569_465_607_404_7,
            0.000_25,
            7.905_694_656_074_047e-5,
        ],
        factor: 1.25,
    },
];

/// The goldens are f32 results of a few operations, and one ramp subtracts numbers of like size.
const RELATIVE_ERROR: f64 = 1e-6;

const NUM_POSITIONS: usize = 70;

impl Golden {
    fn check(&self, device: &Device, case: &Case) -> Checked {
        let (frequencies, factor) = self.spec.frequencies()?;
        let count = format!("{} frequencies, expected {}", frequencies.len(), self.frequencies.len());
        expect::holds(case, &count, frequencies.len() == self.frequencies.len())?;
        for (i, (&actual, &golden)) in frequencies.iter().zip(self.frequencies).enumerate() {
            let good = (actual - golden).abs() <= RELATIVE_ERROR * golden;
            expect::holds(case, &format!("frequency {i} is {actual:e}, expected {golden:e}"), good)?;
        }
        let good = (factor - self.factor).abs() <= RELATIVE_ERROR;
        expect::holds(case, &format!("the factor is {factor}, expected {}", self.factor), good)?;

        let (cos, sin) = self.spec.tables(device, NUM_POSITIONS)?;
        let shape = [NUM_POSITIONS, self.spec.head_dim / 2];
        expect::form(case, "cos", &cos, (&shape, DType::F32))?;
        expect::form(case, "sin", &sin, (&shape, DType::F32))?;
        let (cos, sin) = (data::read(&cos)?, data::read(&sin)?);
        for position in 0..NUM_POSITIONS {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (angle, at) = (position as f64 * frequency, position * self.frequencies.len() + i);
                // The goldens' error grows with the position.
                let limit = RELATIVE_ERROR * self.factor * (1.0 + angle);
                for (name, actual, exact) in [("cos", cos[at], angle.cos()), ("sin", sin[at], angle.sin())] {
                    let exact = exact * self.factor;
                    let good = (actual - exact).abs() <= limit;
                    expect::holds(case, &format!("{name}[{position}, {i}] is {actual}, expected {exact}"), good)?;
                }
            }
        }
        Ok(())
    }
}

fn rejects_fields(device: &Device, case: &Case) -> Checked {
    let good = RopeSpec { head_dim: 8, theta: 10_000.0, scaling: Scaling::Default };
    let refuse = |field, spec: RopeSpec| expect::rejects(case, Rejects::Spec(field), spec.tables(device, 3));
    refuse("head_dim", RopeSpec { head_dim: 0, ..good })?;
    refuse("head_dim", RopeSpec { head_dim: 7, ..good })?;
    for theta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refuse("theta", RopeSpec { theta, ..good })?;
    }
    for factor in [0.5, 0.0, f64::NAN, f64::INFINITY] {
        refuse("factor", RopeSpec { scaling: Scaling::Linear { factor }, ..good })?;
    }
    let llama3 = |low_freq_factor, high_freq_factor| Scaling::Llama3 {
        factor: 8.0,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: 8192,
    };
    for (low, high) in [(4.0, 1.0), (1.0, 1.0), (0.0, 4.0), (f64::NAN, 4.0), (1.0, f64::NAN)] {
        refuse("high_freq_factor", RopeSpec { scaling: llama3(low, high), ..good })?;
    }
    let yarn = |beta_fast, beta_slow| Scaling::Yarn {
        factor: 4.0,
        beta_fast,
        beta_slow,
        original_max_position_embeddings: 512,
        attention_factor: 1.0,
        truncate: true,
    };
    for (fast, slow) in [(1.0, 32.0), (32.0, 0.0), (f64::NAN, 1.0), (32.0, f64::NAN)] {
        refuse("beta_fast", RopeSpec { scaling: yarn(fast, slow), ..good })?;
    }
    Ok(())
}
