//! Checkpoints that say what no checkpoint of Limosa's says: whole files with matching digests, and one value in the state
//! replaced.
//!
//! A value is named by its place in the CBOR tree, counted depth first; what replaces it depends on what it is:
//!
//! | value | replaced by |
//! | --- | --- |
//! | integer | 0, 1, −1, 2³¹ − 1, 2³¹, 2⁶⁴ − 1, −2⁶³, one more, one bit more |
//! | list | none, its first element twice, in reverse, a thousand times its first |
//! | bytes, text | none, a NUL, `../../..`, 100,000 letters |
//! | anything | null |

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use cbor4ii::core::Value;
use limosa_image::{Checkpoint, CheckpointWriter, Meta, Sink, SpaceId, WriteError, cbor};

/// The section of a checkpoint that holds the process tree.
pub const TREE: &str = "tree";

/// The state of a checkpoint, in which values can be replaced.
pub struct State(Value);

impl State {
    /// That of `checkpoint`.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self(checkpoint.state(TREE)?))
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        let mut count = 0;
        each(&self.0, &mut |_| count += 1);
        count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Everything that may stand in the place of value `number`.
    pub fn replacements(&self, number: usize) -> Vec<Value> {
        let (mut count, mut found) = (0, Vec::new());
        each(&self.0, &mut |value| {
            if count == number {
                found = replacements(value);
            }
            count += 1;
        });
        found
    }

    /// The state with another value in place `number`, as CBOR.
    pub fn with(&self, number: usize, replacement: &Value) -> Result<Vec<u8>> {
        let mut state = self.0.clone();
        let mut left = number;
        replace(&mut state, &mut left, replacement);
        Ok(cbor::encode(&state)?)
    }
}

/// Calls `see` for each value, depth first.
pub fn each(value: &Value, see: &mut impl FnMut(&Value)) {
    see(value);
    match value {
        Value::Array(items) => items.iter().for_each(|item| each(item, see)),
        Value::Map(entries) => entries.iter().for_each(|(_, item)| each(item, see)),
        Value::Tag(_, inner) => each(inner, see),
        _ => {}
    }
}

/// Replaces the value that is `left` places further on; whether it did.
pub fn replace(value: &mut Value, left: &mut usize, replacement: &Value) -> bool {
    if *left == 0 {
        *value = replacement.clone();
        return true;
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| replace(item, left, replacement)),
        Value::Map(entries) => entries.iter_mut().any(|(_, item)| replace(item, left, replacement)),
        Value::Tag(_, inner) => replace(inner, left, replacement),
        _ => false,
    }
}

fn replacements(value: &Value) -> Vec<Value> {
    let mut all = match value {
        Value::Integer(number) => {
            let fixed = [0, 1, -1, i128::from(i32::MAX), 1 << 31, i128::from(u64::MAX), i128::from(i64::MIN)];
            let near = [number + 1, number ^ (1 << 12)];
            fixed.into_iter().chain(near).filter(|other| other != number).map(Value::Integer).collect()
        }
        Value::Array(items) => {
            let mut twice = items.clone();
            twice.extend(items.first().cloned());
            let many = items.first().map(|first| vec![first.clone(); 1000]).unwrap_or_default();
            let reverse = items.iter().rev().cloned().collect();
            [Vec::new(), twice, reverse, many].into_iter().map(Value::Array).collect()
        }
        Value::Bytes(_) => strings().into_iter().map(|text| Value::Bytes(text.into_bytes())).collect(),
        Value::Text(_) => strings().into_iter().map(Value::Text).collect(),
        Value::Bool(flag) => vec![Value::Bool(!flag)],
        _ => Vec::new(),
    };
    all.push(Value::Null);
    all
}

fn strings() -> [String; 4] {
    [String::new(), "\0".into(), "../../..".into(), "x".repeat(100_000)]
}

/// Writes `original` to the directory `out` with another state, as whole as ever.
pub fn write(original: &Checkpoint, state: &[u8], out: &Path) -> Result<()> {
    let mut writer = CheckpointWriter::create(out)?;
    original.copy_into(&mut Replacing { writer: &mut writer, state }).context("copying a checkpoint")?;
    writer.commit(Meta::new("hostile", Vec::new()))?;
    Ok(())
}

struct Replacing<'a> {
    writer: &'a mut CheckpointWriter,
    state: &'a [u8],
}

impl Sink for Replacing<'_> {
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        self.writer.state(name, if name == TREE { self.state } else { cbor })
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        self.writer.pages(space, start, data)
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        self.writer.forget(space, start, length)
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        self.writer.blob(name, content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_is_replaced_and_no_other() {
        let number = |number| Value::Integer(number);
        let list = |items: &[i128]| Value::Array(items.iter().copied().map(number).collect());
        let state = State(Value::Array(vec![number(7), list(&[8, 9])]));
        assert_eq!(state.len(), 5);
        let replaced = |place| cbor::decode::<Value>(&state.with(place, &number(1)).unwrap()).unwrap();
        assert_eq!(replaced(1), Value::Array(vec![number(1), list(&[8, 9])]));
        assert_eq!(replaced(4), Value::Array(vec![number(7), list(&[8, 1])]));
        assert_eq!(replaced(2), Value::Array(vec![number(7), number(1)]));
        assert!(state.replacements(2).contains(&list(&[9, 8])));
    }
}
