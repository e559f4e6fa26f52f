//! Rotary embedding settings of a Hugging Face configuration.
