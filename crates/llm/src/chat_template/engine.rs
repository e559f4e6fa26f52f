//! A minijinja environment that renders as the Jinja2 environment of transformers does.

use std::fmt;

use chrono::{
    Local,
    format::{Item, StrftimeItems},
};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, Value, ValueKind},
};

use super::python::Dumps;

/// Put around what a `{% generation %}` block renders. Noncharacters, which no text is supposed to hold.
pub(super) const GENERATION: [&str; 2] = ["\u{fdd0}generation\u{fdd1}", "\u{fdd1}generation\u{fdd0}"];

/// Name of the filter behind `{% generation %}`.
const GENERATION_FILTER: &str = "__generation__";

/// The source of an error that a template raised itself.
#[derive(Debug)]
pub(super) struct Raised;

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    // In Python a string is a sequence of strings, and a dictionary has a length and items.
    let is_sequence = |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Undefined)
    };
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", move |value: &Value| is_sequence(value) || value.kind() == ValueKind::Iterable);
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.to_string()).with_source(Raised))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter(GENERATION_FILTER, |body: &str| {
        let [open, close] = GENERATION;
        format!("{open}{body}{close}")
    });
    Ok(environment)
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
fn tojson(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = named.get::<Option<Value>>(name)?.or_else(|| positional.get(index).cloned());
        Ok(given.filter(|value| !value.is_none()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ensure_ascii = is_true(argument(0, "ensure_ascii")?);
    let indent = match argument(1, "indent")? {
        None => None,
        Some(indent) => match indent.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(" ".repeat(usize::try_from(indent)?)),
        },
    };
    let separators = match argument(2, "separators")? {
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
        Some(pair) => {
            let pair: Vec<String> = pair.try_iter()?.map(|text| text.to_string()).collect();
            let count = pair.len();
            let wrong = |_| Error::new(ErrorKind::InvalidOperation, format!("tojson: {count} separators, must be 2"));
            pair.try_into().map_err(wrong)?
        }
    };
    let sort_keys = is_true(argument(3, "sort_keys")?);
    named.assert_all_used()?;
    let [item_separator, key_separator] = separators;
    Dumps { ensure_ascii, indent, item_separator, key_separator, sort_keys }.text(value)
}

/// `datetime.now().strftime(format)`
fn strftime_now(format: &str) -> Result<String, Error> {
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        let message = format!("strftime_now: `{format}` is not a format of dates");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(Local::now().format_with_items(items.into_iter()).to_string())
}

/// Whether the source has a `{% generation %}` block, and the source with such blocks as a filter over a scope of its own, which is
/// what transformers makes of them. (A `{% call %}` would be closer in words, but its body cannot set a namespace of the outside.)
/// White space is controlled as before, and lines stay where they are.
pub(super) fn prepare(source: &str) -> (bool, String) {
    // Jinja2 reads every line ending as a line feed.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut prepared = String::with_capacity(source.len());
    let mut has_generation = false;
    let mut rest = source.as_str();
    while let Some(start) =
        rest.match_indices('{').map(|(start, _)| start).find(|&start| closing(&rest[start..]).is_some())
    {
        let end =
            closing(&rest[start..]).and_then(|mark| rest[start..].find(mark)).map_or(rest.len(), |at| start + at + 2);
        prepared.push_str(&rest[..start]);
        let tag = &rest[start..end];
        let inside = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")).unwrap_or_default();
        let sign = |c: Option<char>| c.filter(|c| "-+".contains(*c)).map(String::from).unwrap_or_default();
        let (before, after) = (sign(inside.chars().next()), sign(inside.chars().next_back()));
        let lines = "\n".repeat(inside.matches('\n').count());
        match inside.trim_matches(['-', '+']).trim() {
            "generation" => {
                has_generation = true;
                prepared.push_str(&format!("{{%{before}{lines} filter {GENERATION_FILTER} %}}{{% with {after}%}}"));
            }
            "endgeneration" => prepared.push_str(&format!("{{%{before}{lines} endwith %}}{{% endfilter {after}%}}")),
            _ => prepared.push_str(tag),
        }
        rest = &rest[end..];
    }
    prepared.push_str(rest);
    (has_generation, prepared)
}

/// What ends the comment, statement or expression that begins here.
fn closing(text: &str) -> Option<&'static str> {
    [("{#", "#}"), ("{%", "%}"), ("{{", "}}")]
        .into_iter()
        .find(|(open, _)| text.starts_with(open))
        .map(|(_, close)| close)
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        let mut environment = environment()?;
        environment.add_template_owned("t", prepare(source).1)?;
        let messages: crate::json::Json = serde_json::from_str(
            r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo ", "items": [1]}]"#,
        )
        .unwrap();
        environment
            .get_template("t")?
            .render(context! { messages => Value::from(&messages), x => 1.0, none_ => (), text => "abc" })
    }

    // The expectations are what Jinja2 3.1 renders with the environment of transformers.
    #[test]
    fn renders_as_jinja2_does() {
        let cases = [
            (
                "{{ x }} {{ none_ }} {{ true }} {{ undefined_ }}|{{ ['a', \"it's\", {'b': none}] }}",
                "1.0 None True |['a', \"it's\", {'b': None}]",
            ),
            (
                "{{ text is iterable }} {{ text is sequence }} {{ messages[0] is sequence }} {{ 3 is iterable }}",
                "True True True False",
            ),
            ("{{ messages[0] is mapping }} {{ text is mapping }} {{ none_ is none }}", "True False True"),
            ("{% for m in messages[::-1] %}{{ m['content'].strip() }},{% endfor %}", "yo,hi,"),
            ("{% set rest = messages[1:] %}{{ rest[0].role }} {{ rest | length }}", "assistant 1"),
            ("{% for k, v in messages[1].items() %}{{ k }} {% endfor %}", "role content items "),
            ("{{ messages[0] | tojson(indent=2) }}", "{\n  \"role\": \"user\",\n  \"content\": \"hi\"\n}"),
            ("{{ messages[0] | tojson(separators=(',', ':')) }}", "{\"role\":\"user\",\"content\":\"hi\"}"),
            ("{{ {'a': 'é<'} | tojson(ensure_ascii=True) }}", "{\"a\": \"\\u00e9<\"}"),
            ("  {% if true %}\n a\n  {% endif %}\nb\n\n", " a\nb\n"),
            ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{{ 'a</think>b'.split('</think>')[-1] }} {{ '\\nx\\n'.lstrip('\\n') ~ '.' }}", "b x\n."),
            ("{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content }}", "hi"),
            ("{{ messages[0].get('name', 'nobody') }} {{ messages[0].get('name') is none }}", "nobody True"),
            ("a\r\nb{{ 'x' if none_ }}", "a\nb"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn generation_blocks_keep_white_space_and_scope() {
        let [open, close] = GENERATION;
        let cases = [
            ("a\n  {% generation %}\nb\n  {% endgeneration %}\nc", format!("a\n{open}b\n{close}c")),
            ("a {%- generation -%} b {%- endgeneration -%} c", format!("a{open}b{close}c")),
            ("{%generation%}{{ text }}{%endgeneration%}", format!("{open}abc{close}")),
            (
                "{% for m in messages %}{% generation %}{% set text = m.role %}{{ loop.index }}{{ text }}{% endgeneration %}{{ text }}{% endfor %}",
                format!("{open}1user{close}abc{open}2assistant{close}abc"),
            ),
            (
                "{% set ns = namespace(n=0) %}{% generation %}{% set ns.n = 1 %}{% endgeneration %}{{ ns.n }}",
                format!("{open}{close}1"),
            ),
            ("\n{%-\ngeneration\n-%} x {% endgeneration %}", format!("{open}x {close}")),
        ];
        for (source, expected) in cases {
            assert!(prepare(source).0);
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
        let plain =
            "{# {% generation %} #}{% if add_generation_prompt %}{{ '{% generation %}' }}{% endif %}{ x }{% for";
        assert_eq!(prepare(plain), (false, plain.to_owned()));
    }

    #[test]
    fn failures_name_the_line() {
        let error = render("a\n{% if true %}\n{{ raise_exception('no ' + text) }}{% endif %}").unwrap_err();
        assert_eq!((error.line(), error.detail()), (Some(3), Some("no abc")));
        assert!(std::error::Error::source(&error).is_some_and(|source| source.is::<Raised>()));
        assert_eq!(render("\n{{ undefined_ | tojson }}").unwrap_err().line(), Some(2));
        assert_eq!(render("\n\n{% wrong %}").unwrap_err().line(), Some(3));
    }

    #[test]
    fn dates() {
        let year: i32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
        assert!((2024..2200).contains(&year), "{year}");
        let day = render("{{ strftime_now('%d %b %Y') }}").unwrap();
        assert!(chrono::NaiveDate::parse_from_str(&day, "%d %b %Y").is_ok(), "{day}");
        assert!(render("{{ strftime_now('%Q!') }}").unwrap_err().to_string().contains("%Q!"));
    }
}
