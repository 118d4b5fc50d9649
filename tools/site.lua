-- What Quarto's Markdown has and pandoc's hasn't: callouts and tabs. And tables scroll in a box of their own.
local titles = { note = "Note", tip = "Tip", important = "Important", warning = "Warning", caution = "Caution" }

local function callout(div, kind)
  local title = { pandoc.Str(div.attributes.title or titles[kind] or "Note") }
  if div.content[1] and div.content[1].t == "Header" then title = table.remove(div.content, 1).content end
  local folded = div.attributes.collapse ~= nil
  local open = (folded and div.attributes.collapse ~= "true") and " open" or ""
  local box, head = folded and "details" or "div", folded and "summary" or "p"
  local blocks = pandoc.Blocks({ pandoc.RawBlock("html", string.format('<%s class="callout callout-%s"%s><%s class="callout-title">', box, kind, open, head)),
    pandoc.Plain(title), pandoc.RawBlock("html", "</" .. head .. ">") })
  blocks:extend(div.content)
  blocks:insert(pandoc.RawBlock("html", "</" .. box .. ">"))
  return blocks
end

local function tabset(div) -- readable one below the other; site.js makes tabs of it
  local level = div.content[1] and div.content[1].level
  local blocks = pandoc.Blocks({ pandoc.RawBlock("html", '<div class="tabset">') })
  local open = false
  for _, block in ipairs(div.content) do
    if block.t == "Header" and block.level == level then
      if open then blocks:insert(pandoc.RawBlock("html", "</section>")) end
      blocks:insert(pandoc.RawBlock("html", '<section><p class="tab">'))
      blocks:insert(pandoc.Plain(block.content))
      blocks:insert(pandoc.RawBlock("html", "</p>"))
      open = true
    else
      blocks:insert(block)
    end
  end
  if open then blocks:insert(pandoc.RawBlock("html", "</section>")) end
  blocks:insert(pandoc.RawBlock("html", "</div>"))
  return blocks
end

function Div(div)
  for _, class in ipairs(div.classes) do
    local kind = class:match("^callout%-(%a+)$")
    if kind then return callout(div, kind) end
    if class == "panel-tabset" then return tabset(div) end
  end
end

function Table(table) return pandoc.Div({ table }, { class = "scroll" }) end

local function take(attributes, key)
  local value = attributes[key]
  attributes[key] = nil
  return value
end

function Image(image)
  image.attributes.loading = "lazy"
  image.attributes.alt = take(image.attributes, "fig-alt") or image.attributes.alt or pandoc.utils.stringify(image.caption)
  return image
end

function Para(para) -- a picture alone is a figure
  local image = para.content[1]
  if #para.content ~= 1 or image.t ~= "Image" then return nil end
  local caption = take(image.attributes, "fig-cap")
  local blocks = pandoc.Blocks({ pandoc.RawBlock("html", "<figure>"), pandoc.Plain({ image }) })
  if caption then blocks:insert(pandoc.RawBlock("html", "<figcaption>" .. caption .. "</figcaption>")) end
  blocks:insert(pandoc.RawBlock("html", "</figure>"))
  return blocks
end

function Math(math) -- what may be wider than a phone scrolls
  if math.mathtype == "DisplayMath" then return pandoc.Span({ math }, { class = "equation" }) end
  if #math.text > 24 then return pandoc.Span({ math }, { class = "formula" }) end
end
