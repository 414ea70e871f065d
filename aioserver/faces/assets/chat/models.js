// The choice of a provider and a model: a <select> with the server's list; the choice is stored.

export const DEFAULT_CHOICE = { provider: null, model: null };

async function getJson(path) {
  // no-store: `/` is also the address of this page, and the cache would return the page
  const options = { headers: { Accept: "application/json" }, cache: "no-store" };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(10_000) });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

export class Models {
  // `changed()` is called when the choice, or what is known of it, has changed.
  constructor(select, { store, changed }) {
    this.select = select;
    this.changed = changed;
    this.simulated = false; // whether the simulator answers instead of a model
    this.active = ""; // the provider that the server asks by default; "" if it does not say
    this.simulators = new Set(); // the providers that are simulated
    this.allSimulated = false;
    this.choice = { ...DEFAULT_CHOICE, ...store.getSetting("choice", DEFAULT_CHOICE) };
    this.choices = new Map(); // an option's value → the choice
    this.filled = ""; // the data that the <select> was filled with
    select.addEventListener("change", () => {
      this.choice = this.choices.get(select.value);
      store.setSetting("choice", this.choice);
      this.drawChoice();
    });
  }

  // Read the list from the server. Returns the answer of `/`.
  async load() {
    const [overview, models] = await Promise.all([getJson("/"), getJson("/v1/models")]);
    // Where keys are required, `/` has only the addresses of the faces.
    const { active_provider: active = "", providers = {} } = overview;
    const owners = models.data.map((model) => model.owned_by);
    const names = [...new Set([...Object.keys(providers), ...owners])];
    const filled = JSON.stringify([active, names, models]);
    this.active = active;
    this.simulators = new Set(models.data.filter((model) => model.simulated).map((model) => model.owned_by));
    this.allSimulated = owners.every((name) => this.simulators.has(name));
    if (this.filled !== filled) this.fill(active, names, models.data);
    this.drawChoice();
    this.filled = filled; // the same list is not filled again, so that an open one stays open
    return overview;
  }

  // Without a choice the active provider answers; where that is not known, it is one of those in the list.
  drawChoice() {
    const provider = this.choice.provider ?? this.active;
    this.simulated = provider ? this.simulators.has(provider) : this.allSimulated;
    this.changed();
  }

  fill(active, providers, models) {
    const byProvider = new Map(providers.map((name) => [name, []]));
    for (const { id, owned_by: owner } of models) {
      // A name that leads to a provider by itself is there with the provider's in front of it, too.
      if (id.startsWith(`${owner}/`)) byProvider.get(owner)?.push(id.slice(owner.length + 1));
    }
    this.choices = new Map([["", DEFAULT_CHOICE]]);
    const groups = [...byProvider].map(([provider, names]) => {
      const group = document.createElement("optgroup");
      group.label = names.length ? this.label(provider) : `${provider} (not set up)`;
      group.disabled = names.length === 0;
      group.append(...names.map((model) => this.option({ provider, model })));
      return group;
    });
    this.select.replaceChildren(new Option(active ? `Default (${this.label(active)})` : "Default", ""), ...groups);
    this.select.value = value(this.choice);
    if (this.select.selectedIndex < 0) {
      this.choice = DEFAULT_CHOICE; // the chosen model is no longer there
      this.select.value = "";
    }
  }

  label(provider) {
    return this.simulators.has(provider) ? `${provider}, simulated` : provider;
  }

  option(choice) {
    this.choices.set(value(choice), choice);
    return new Option(choice.model, value(choice));
  }
}

function value({ provider, model }) {
  return provider === null ? "" : `${provider}/${model}`;
}
