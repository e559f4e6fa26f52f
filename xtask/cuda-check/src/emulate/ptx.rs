//! Inline PTX in generated CUDA C++ as calls that a host compiler takes.

use anyhow::{Context, Result, bail, ensure};

const START: &str = "asm volatile(";

/// `asm volatile("NAME" " {%0, ..}, ..;" : "=r"(a), .. : "r"(b), ..)` as `emulated::ptx("NAME", std::tie(a, ..), std::tie(b, ..))`,
/// everywhere in `source`.
///
/// # Errors
/// If an instruction does not have its operands in order, or none.
pub(crate) fn as_calls(source: &str) -> Result<String> {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find(START) {
        text.push_str(&rest[..start]);
        let inside = &rest[start + START.len()..];
        let end = closing(inside).with_context(|| format!("no end of `{}`", &rest[start..]))?;
        text.push_str(&call(&inside[..end]).with_context(|| inside[..end].to_owned())?);
        rest = &inside[end + 1..];
    }
    text.push_str(rest);
    Ok(text)
}

/// Where the parenthesis that was open before `text` closes; those in strings do not count.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quoted) = (0usize, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b'(' if !quoted => depth += 1,
            b')' if !quoted && depth == 0 => return Some(at),
            b')' if !quoted => depth -= 1,
            _ => {}
        }
    }
    None
}

fn call(asm: &str) -> Result<String> {
    let sections = split(asm, ':');
    let [template, outs, ins] = sections.as_slice() else {
        bail!("{} parts, expected a template, outputs and inputs", sections.len());
    };
    let template: String = template.split('"').skip(1).step_by(2).collect();
    let (outs, ins) = (operands(outs, "=")?, operands(ins, "")?);
    let placeholders: Vec<String> =
        template.split('%').skip(1).map(|text| text.chars().take_while(char::is_ascii_digit).collect()).collect();
    let in_order: Vec<String> = (0..outs.len() + ins.len()).map(|i| i.to_string()).collect();
    ensure!(placeholders == in_order, "operands {placeholders:?}, expected {in_order:?}");
    let name = template.split_whitespace().next().context("no instruction")?;
    Ok(format!("emulated::ptx(\"{name}\", std::tie({}), std::tie({}))", outs.join(", "), ins.join(", ")))
}

/// Parts of `text` between separators that are neither in a string nor in parentheses, nor doubled.
fn split(text: &str, separator: char) -> Vec<&str> {
    let (mut parts, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0usize, false);
    for (at, character) in text.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth = depth.saturating_sub(1),
            _ if character == separator && !quoted && depth == 0 => {
                parts.push(&text[start..at]);
                start = at + separator.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// The variables of `"=r"(a), "=f"(b)`.
fn operands<'a>(list: &'a str, prefix: &str) -> Result<Vec<&'a str>> {
    let operand = |text: &'a str| -> Result<&'a str> {
        let (constraint, variable) = text.trim().split_once('(').context("an operand without a variable")?;
        let known = ["r", "f"].iter().any(|kind| constraint == format!("\"{prefix}{kind}\""));
        ensure!(known, "operand {constraint}: not emulated");
        variable.strip_suffix(')').context("an operand without an end")
    };
    split(list, ',').into_iter().map(operand).collect()
}

#[cfg(test)]
mod tests {
    use super::as_calls;

    #[test]
    fn an_instruction_becomes_a_call() {
        let source = "void f() {\n  asm volatile(\"mma.sync.x\"\n \" {%0, %1}, {%2};\"\n : \"=f\"(d_0), \"=f\"(d_1)\n : \"r\"(a));\n}";
        let expected = "void f() {\n  emulated::ptx(\"mma.sync.x\", std::tie(d_0, d_1), std::tie(a));\n}";
        assert_eq!(as_calls(source).unwrap(), expected);
        assert_eq!(as_calls("no assembly").unwrap(), "no assembly");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for asm in ["\"x %1, %0;\" : \"=r\"(a) : \"r\"(b)", "\"x %0;\" : \"=l\"(a) : \"r\"(b)", "\"x %0;\" : \"=r\"(a)"]
        {
            assert!(as_calls(&format!("asm volatile({asm});")).is_err(), "{asm}");
        }
    }
}
