//! `/api/show` as Ollama's clients read it.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Map, Value};
use v4_modelfile::{Directive, MessageRole, Modelfile, Parameter};
use v4_proto::{Ability, Inspection, Message, Role, TensorInfo};

use crate::{
    api::{bytes, clock, ollama::listing::Details},
    ops::models::{Facts, Model, Template},
};

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(skip_serializing_if = "String::is_empty")]
    license: String,
    modelfile: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    parameters: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    template: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    system: Option<&'a str>,
    details: Details,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    messages: &'a [Message],
    model_info: Map<String, Value>,
    tensors: &'a [TensorInfo],
    capabilities: &'a [Ability],
    modified_at: String,
    /// v4's own: where it came from, as far as that is known.
    #[serde(skip_serializing_if = "Value::is_null")]
    provenance: &'a Value,
    /// v4's own: what a person should know of this model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// The answer for a model and what its header says.
pub fn show(model: &Model, inspection: &Inspection) -> Vec<u8> {
    let texts = &model.texts;
    let template = match &texts.template {
        Some(Template::Jinja(text)) => text,
        _ => inspection.chat_template.as_deref().unwrap_or_default(),
    };
    bytes(&Shown {
        license: texts.licenses.join("\n"),
        modelfile: modelfile(model),
        parameters: parameters(&texts.params),
        template,
        system: texts.system.as_deref(),
        details: Facts::from(&inspection.info).into(),
        messages: &texts.messages,
        model_info: model_info(inspection),
        tensors: &inspection.tensors,
        capabilities: &inspection.info.abilities,
        modified_at: clock::local(model.record.modified),
        provenance: &model.origin,
        warnings: warnings(model, inspection),
    })
}

fn warnings(model: &Model, inspection: &Inspection) -> Vec<String> {
    let mut warnings = Vec::new();
    if !inspection.info.supported {
        let arch = &inspection.info.arch;
        warnings.push(format!("this version of v4 cannot run the architecture {arch}"));
    }
    if matches!(model.texts.template, Some(Template::Go(_))) {
        warnings.push(
            "the model's TEMPLATE is in Go's template language, which this version of v4 does not \
             run; the chat template in the weights is used instead"
                .to_owned(),
        );
    }
    warnings
}

/// All metadata but the two entries that stand elsewhere in the answer, and the count of weights.
fn model_info(inspection: &Inspection) -> Map<String, Value> {
    let mut info = inspection.metadata.clone();
    info.shift_remove("general.name");
    info.shift_remove("tokenizer.chat_template");
    info.insert("general.parameter_count".to_owned(), inspection.info.n_params.into());
    info
}

/// One parameter a line: the name in 30 columns, then the value, texts in quotes. Clients parse it.
fn parameters(params: &Map<String, Value>) -> String {
    let mut out = String::new();
    each_parameter(params, |name, value| {
        let gap = if out.is_empty() { "" } else { "\n" };
        write!(out, "{gap}{name:<30} {value}").expect("writing to a String cannot fail");
    });
    out
}

/// Lists become a line an element.
fn each_parameter(params: &Map<String, Value>, mut take: impl FnMut(&str, &Value)) {
    for (name, value) in params {
        match value {
            Value::Array(items) => items.iter().for_each(|item| take(name, item)),
            value => take(name, value),
        }
    }
}

/// A Modelfile that makes this model again.
fn modelfile(model: &Model) -> String {
    let texts = &model.texts;
    let weights = model.files.weights.iter();
    let mut directives: Vec<Directive> = if model.files.names.is_empty() {
        weights.map(|path| Directive::From(path.display().to_string())).collect()
    } else {
        // The files of a folder have their names in the manifest alone.
        vec![Directive::From(model.record.name.to_string())]
    };
    if let Some(Template::Jinja(text) | Template::Go(text)) = &texts.template {
        directives.push(Directive::Template(text.clone()));
    }
    directives.extend(texts.system.clone().map(Directive::System));
    each_parameter(&texts.params, |name, value| {
        directives.push(Directive::Parameter(parameter(name, value)));
    });
    directives.extend(texts.messages.iter().filter_map(|message| {
        let role = match message.role {
            Role::System => MessageRole::System,
            Role::User => MessageRole::User,
            Role::Assistant => MessageRole::Assistant,
            Role::Tool => return None,
        };
        Some(Directive::Message { role, content: message.content.clone() })
    }));
    directives.extend(texts.licenses.iter().cloned().map(Directive::License));
    let name = &model.record.name;
    format!("# Made by v4. To build on this model: FROM {name}\n\n{}", Modelfile { directives })
}

fn parameter(name: &str, value: &Value) -> Parameter {
    let value = match value {
        Value::Bool(value) => v4_modelfile::Value::Bool(*value),
        Value::String(text) => v4_modelfile::Value::Text(text.clone()),
        value => match (value.as_i64(), value.as_f64()) {
            (Some(n), _) => v4_modelfile::Value::Int(n),
            (None, Some(x)) => v4_modelfile::Value::Float(x),
            (None, None) => v4_modelfile::Value::Text(value.to_string()),
        },
    };
    Parameter { name: name.to_owned(), value }
}
