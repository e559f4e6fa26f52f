//! Rows of a Parquet file as JSON: what the same row would be as a line of JSONL, so that everything behind it is the same.

use std::{fs::File, path::Path};

use parquet::{
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap, SerializeSeq},
};

use crate::{Error, Result};

/// Calls `each` with the number, from 1, and the JSON text of every row.
pub(super) fn read(path: &Path, file: File, each: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    let damaged = |source: ParquetError| Error::Parquet { path: path.to_owned(), source: source.into() };
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    let mut text = Vec::new();
    for (index, row) in reader.get_row_iter(None).map_err(damaged)?.enumerate() {
        text.clear();
        serde_json::to_writer(&mut text, &JsonRow(&row.map_err(damaged)?)).map_err(Error::json(path))?;
        each(index + 1, &text)?;
    }
    Ok(())
}

/// A row or struct as a JSON object, fields in the order of the schema: a template may print them.
struct JsonRow<'a>(&'a Row);

impl Serialize for JsonRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.get_column_iter().map(|(name, field)| (name, JsonField(field))))
    }
}

struct JsonField<'a>(&'a Field);

impl Serialize for JsonField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Field::Null => serializer.serialize_unit(),
            Field::Bool(value) => serializer.serialize_bool(*value),
            Field::Byte(value) => serializer.serialize_i8(*value),
            Field::Short(value) => serializer.serialize_i16(*value),
            Field::Int(value) => serializer.serialize_i32(*value),
            Field::Long(value) => serializer.serialize_i64(*value),
            Field::UByte(value) => serializer.serialize_u8(*value),
            Field::UShort(value) => serializer.serialize_u16(*value),
            Field::UInt(value) => serializer.serialize_u32(*value),
            Field::ULong(value) => serializer.serialize_u64(*value),
            Field::Float16(value) => serializer.serialize_f32(value.to_f32()),
            Field::Float(value) => serializer.serialize_f32(*value),
            Field::Double(value) => serializer.serialize_f64(*value),
            Field::Str(text) => serializer.serialize_str(text),
            // Some writers do not mark texts as such.
            Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => serializer.serialize_str(text),
                Err(_) => serializer.serialize_unit(),
            },
            Field::Group(row) => JsonRow(row).serialize(serializer),
            Field::ListInternal(list) => {
                let mut elements = serializer.serialize_seq(Some(list.elements().len()))?;
                list.elements().iter().try_for_each(|element| elements.serialize_element(&JsonField(element)))?;
                elements.end()
            }
            Field::MapInternal(map) => {
                let mut entries = serializer.serialize_map(Some(map.entries().len()))?;
                for (key, value) in map.entries() {
                    entries.serialize_entry(&JsonField(key), &JsonField(value))?;
                }
                entries.end()
            }
            // No form of example has dates or decimals: what they look like matters to a template at most.
            other => serializer.collect_str(other),
        }
    }
}
