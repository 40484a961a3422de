//! How much memory a model needs, and whether and where it may have it.

use std::{fmt::Write as _, sync::Arc};

use v4_proto::{Code, Fault};

use super::{
    Device, Devices, Free, HOST, Hold, Level, Model, Needs, Phase, Placement, Room, Spread, State,
    key, place, worth::Mib,
};
use crate::Target;

impl State {
    /// `target` with the best place that it may have beside the models that are pinned, and with as
    /// many sequences as have room there.
    ///
    /// # Errors
    /// `out_of_memory` when not even one has, `unsupported` when its rules name a device that is
    /// not there.
    pub(super) fn fit(&self, target: Target, hold: Hold) -> Result<Model, Fault> {
        let Some(info) = &target.info else {
            return Err(Fault::internal("a model was asked for before its header was read"));
        };
        let own = key(&target.name);
        let rules = self.rules.models.of(&own);
        let context = rules.context.unwrap_or(self.rules.context);
        // Never more than the model was trained for.
        let context = match info.context_length {
            0 => context,
            trained => context.min(trained),
        };
        let free = self.unpinned(&own);
        let room = self.room(&own, &free)?;
        let most = rules.slots.unwrap_or(self.rules.slots).max(1);
        let needs =
            |slots: u32| Needs::of(info, self.rules.kv_type, u64::from(context) * u64::from(slots));
        let mut best: Option<(u32, Placement)> = None;
        for slots in (1..=most).rev() {
            let Some(found) = place(&needs(slots), &room) else { continue };
            // A better place is worth more than more sequences.
            if best.as_ref().is_none_or(|(_, other)| found.level < other.level) {
                best = Some((slots, found));
            }
            let is_best = |level| level == Level::Gpus || room.gpus.is_empty();
            if best.as_ref().is_some_and(|(_, best)| is_best(best.level)) {
                break;
            }
        }
        let Some((slots, placement)) = best else {
            let bytes = needs(1).in_one_place();
            let text = self.too_large(&target, (bytes, context), &free, &room);
            return Err(Fault::new(Code::OutOfMemory, text));
        };
        let bytes = placement.spread.total();
        Ok(Model { target, context, slots, bytes, placement, hold })
    }

    /// Bytes that the model of `own` could have if all left that may.
    fn unpinned(&self, own: &str) -> Spread {
        let others = self.loaded().filter(|(_, runner, model, _)| {
            self.is_pinned(model)
                && runner.phase != Phase::Stopping
                && key(&model.target.name) != own
        });
        let pinned = others.map(|(_, runner, ..)| &runner.held);
        self.budgets().minus(&pinned.fold(Spread::default(), Spread::plus))
    }

    /// Why a model does not fit, and what to do.
    fn too_large(
        &self,
        target: &Target,
        (bytes, context): (u64, u32),
        free: &Spread,
        room: &Room,
    ) -> String {
        let budgets = self.budgets();
        let mut may = Mib(budgets.of(HOST)).to_string();
        for gpu in &room.gpus {
            // A string takes whatever is written.
            let _ = write!(may, " and {} of {}", Mib(budgets.of(&gpu.device)), gpu.device);
        }
        let of_others = match budgets.minus(free).total() {
            0 => String::new(),
            pinned => format!(", of which pinned models take {}", pinned.div_ceil(1 << 20)),
        };
        format!(
            "{} needs {} with a context of {context} tokens, and v4 may use {may}{of_others}; give \
             it a smaller context or take a smaller model",
            target.name,
            Mib(bytes),
        )
    }

    /// Where the model of `own` may lie, with `free` bytes on each device.
    ///
    /// # Errors
    /// `unsupported` when its rules name a device that it cannot lie on.
    pub(super) fn room(&self, own: &str, free: &Spread) -> Result<Room, Fault> {
        let rules = self.rules.models.of(own);
        let usable = match rules.device.as_deref() {
            None => self.devices.usable(),
            Some(host) if host.eq_ignore_ascii_case(HOST) => Vec::new(),
            Some(name) => vec![wished(&self.devices, own, name)?],
        };
        let gpus = usable.into_iter().map(|device| Free {
            device: Arc::clone(&device.id),
            capability: device.gpu.capability,
            bytes: free.of(&device.id),
        });
        let max_gpus = rules.gpus.map_or(usize::MAX, |n| n as usize);
        Ok(Room { host: free.of(HOST), gpus: gpus.collect(), max_gpus })
    }

    /// The place that a model gets where so much is free of each device; none that is worse than
    /// what it could have if all left that may.
    pub(super) fn find_place(&self, model: &Model, free: &Spread) -> Option<Placement> {
        let info = model.target.info.as_ref()?;
        let room = self.room(&key(&model.target.name), free).ok()?;
        let tokens = u64::from(model.context) * u64::from(model.slots);
        let found = place(&Needs::of(info, self.rules.kv_type, tokens), &room);
        found.filter(|found| found.level <= model.placement.level)
    }
}

/// The device that the rules of `own` name.
fn wished<'a>(devices: &'a Devices, own: &str, name: &str) -> Result<&'a Device, Fault> {
    if !devices.is_known() {
        return Err(Fault::new(
            Code::Overloaded,
            "v4 does not know yet which devices there are; ask again in a second",
        ));
    }
    let why = match devices.find(name) {
        Some(device) => match device.why_not() {
            None => return Ok(device),
            Some(why) => format!("and {device} cannot be used: {why}"),
        },
        None => "and there is no such device here".to_owned(),
    };
    Err(Fault::new(
        Code::Unsupported,
        format!("the settings want {own} on {name}, {why}; change its `device` in the settings"),
    ))
}
