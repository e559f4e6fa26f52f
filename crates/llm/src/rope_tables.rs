//! The rotary tables of a model: made when they are needed, for as many positions as were needed so far.

use std::cell::RefCell;

use unsloth_autograd::ops::RopeAngles;
use unsloth_core::{Device, Result, Tensor, ops::rope_table::RopeSpec};

use crate::config::DecoderConfig;

/// Tables for each kind of rotary embedding that layers of a model have.
pub(crate) struct RopeTables {
    specs: Vec<RopeSpec>,
    /// Cosines and sines, f32 `[num_positions, head_dim / 2]`, for each of `specs`; empty at first.
    tables: RefCell<Vec<(Tensor, Tensor)>>,
}

impl RopeTables {
    /// For the layers of this configuration.
    pub(crate) fn new(config: &DecoderConfig) -> Self {
        let mut specs: Vec<RopeSpec> = Vec::new();
        for layer in &config.layers {
            if !specs.contains(&layer.rope) {
                specs.push(layer.rope);
            }
        }
        Self { specs, tables: RefCell::default() }
    }

    /// Where among [`RopeTables::angles`] those of such layers are; 0 if no layer is such a one.
    pub(crate) fn index(&self, rope: &RopeSpec) -> usize {
        self.specs.iter().position(|spec| spec == rope).unwrap_or(0)
    }

    /// Angles at these positions, i32 `[tokens]`, which are below `num_positions`: one for each kind of rotary embedding.
    pub(crate) fn angles(&self, device: &Device, positions: &Tensor, num_positions: usize) -> Result<Vec<RopeAngles>> {
        let mut tables = self.tables.borrow_mut();
        if tables.first().is_none_or(|(cos, _)| cos.shape()[0] < num_positions) {
            // Powers of two, so that a generation does not make them anew for every token.
            let rows = num_positions.next_power_of_two();
            *tables = self.specs.iter().map(|spec| spec.tables(device, rows)).collect::<Result<_>>()?;
        }
        let angles = |(cos, sin): &(Tensor, Tensor)| RopeAngles {
            cos: cos.clone(),
            sin: sin.clone(),
            positions: positions.clone(),
        };
        Ok(tables.iter().map(angles).collect())
    }
}
